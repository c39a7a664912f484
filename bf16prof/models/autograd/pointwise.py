"""Operators that work on each element, beside those of `operators.py`: what the formulas in `tools/autograd/derivatives.yaml` allocate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bf16prof.models.autograd.operators import to_fp32, wide_or
from bf16prof.models.autograd.tape import STRIDED, GraphNode, Tape, Tensor


def plus_number(tape: Tape, x: Tensor) -> Tensor:
    """x + 1, whose gradient is that of the sum."""
    return tape.new(x.numel, x.width, "add", tape.node((x,), lambda _, grads: grads), x.layout)


def over_number(tape: Tape, x: Tensor) -> Tensor:
    """x / 2."""
    node = tape.node((x,), lambda _, grads: (tape.new(grads[0].numel, grads[0].width, "div", None, grads[0].layout),))
    return tape.new(x.numel, x.width, "div", node, x.layout)


def power(tape: Tape, x: Tensor) -> Tensor:
    """x to the power of a number (`pow_backward`: the gradient times the exponent times x to the power of one less)."""
    x = to_fp32(tape, x)
    return tape.new(x.numel, x.width, "pow", tape.node((x,), _chain(tape, "pow", "mul", "mul"), x), x.layout)


def reciprocal_root(tape: Tape, x: Tensor) -> Tensor:
    """`rsqrt`, which keeps its result."""
    return _of_result(tape, "rsqrt", to_fp32(tape, x), "pow", "mul", "mul")


def tanh(tape: Tape, x: Tensor) -> Tensor:
    """`tanh`, which keeps its result."""
    return _of_result(tape, "tanh", x, "tanh_backward")


def sigmoid(tape: Tape, x: Tensor) -> Tensor:
    """`sigmoid`, which keeps its result."""
    return _of_result(tape, "sigmoid", x, "sigmoid_backward")


def relu(tape: Tape, x: Tensor) -> Tensor:
    """`relu`, which keeps its result."""
    return _of_result(tape, "relu", x, "threshold_backward")


def dropout(tape: Tape, x: Tensor, share: float) -> Tensor:
    """`native_dropout`, which keeps a mask of one byte an element; x itself where nothing is dropped."""
    if not share:
        return x
    node = tape.node((x,), _chain(tape, "native_dropout_backward"))
    out = tape.new(x.numel, x.width, "native_dropout", node)
    tape.save(node, tape.new(x.numel, 1, "native_dropout"))
    return out


def row_mean(tape: Tape, x: Tensor, rows: int) -> Tensor:
    """The mean of each of so many rows; every element's gradient is written out."""
    numel = x.numel
    return tape.new(rows, x.width, "mean", tape.node((x,), lambda _, grads: (tape.new(numel, grads[0].width, "div"),)))


def sliced(tape: Tape, x: Tensor, numel: int) -> Tensor:
    """A view of a part of x, whose gradient is as large as x and in order of x's dimensions."""
    whole, layout = x.numel, x.layout
    node = tape.node((x,), lambda _, grads: (tape.new(whole, grads[0].width, "slice_backward", None, layout),))
    return Tensor(x.storage, numel, x.width, node, layout=STRIDED)


def indexed(tape: Tape, x: Tensor, numel: int) -> Tensor:
    """`index`: a copy of a part of x, whose gradient is put into one as large as x."""
    whole = x.numel

    def run(_: GraphNode, grads: list[Any]) -> Sequence[Any]:
        zeros = tape.new(whole, grads[0].width, "new_zeros")
        return (tape.new(zeros.numel, zeros.width, "index_put"),)

    return tape.new(numel, x.width, "index", tape.node((x,), run))


def added_in_place(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """`x += y`."""
    return Tensor(x.storage, x.numel, x.width, tape.node((x, y), lambda _, grads: (grads[0], grads[0])), layout=x.layout)


def row_sum(tape: Tape, x: Tensor, rows: int) -> Tensor:
    """The sum of each of so many rows, whose gradient is a view."""
    numel = x.numel
    node = tape.node((x,), lambda _, grads: (Tensor(grads[0].storage, numel, grads[0].width, layout=STRIDED),))
    return tape.new(rows, wide_or(tape, x.width), "sum", node)


def divided_in_place(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """`x /= y`, which keeps a copy of x for y's gradient."""
    whole = x.numel

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        of_x = tape.new(whole, grads[0].width, "div")
        held = [tape.new(whole, grads[0].width, name) for name in ("div", "neg", "mul")]
        of_y = tape.new(whole, grads[0].width, "div")
        del saved, held
        return (of_x, of_y)

    kept = tape.new(whole, x.width, "clone")
    return Tensor(x.storage, whole, x.width, tape.node((x, y), run, kept, y), layout=x.layout)


def _chain(tape: Tape, *names: str) -> Callable[[GraphNode, list[Any]], Sequence[Any]]:
    """A backward formula of one result, from so many operators; what they give is held until it is there."""

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        made = [tape.new(grads[0].numel, max(grads[0].width, saved[0].width if saved[0].width >= 2 else 0), name) for name in names]
        del saved
        return (made[-1],)

    return run


def _of_result(tape: Tape, name: str, x: Tensor, *backward: str) -> Tensor:
    out = tape.new(x.numel, x.width, name, tape.node((x,), _chain(tape, *backward)), x.layout)
    tape.save(out.node, tape.detached(out))
    return out
