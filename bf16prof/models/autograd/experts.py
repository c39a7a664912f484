"""Operators of mixtures of experts, none of whose shapes depends on which expert gets which token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bf16prof.models.autograd.operators import TOKEN_BYTES, cast
from bf16prof.models.autograd.tape import GraphNode, Run, Tape, Tensor

INT32 = 4


def topk(tape: Tape, x: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, and where they are; the gradient is put into zeros as large as x."""
    node = tape.node((x,), _into_zeros(tape, x.numel, "scatter"))
    values = tape.new(numel, x.width, "topk", node)
    indices = tape.new(numel, TOKEN_BYTES, "topk")
    tape.save(node, indices)
    return values, indices


def taken(tape: Tape, x: Tensor, numel: int, indices: Tensor) -> Tensor:
    """`x[indices]`, rows of x by indices that are kept."""
    return tape.new(numel, x.width, "index", tape.node((x,), _into_zeros(tape, x.numel, "index_put"), indices))


def _into_zeros(tape: Tape, numel: int, name: str) -> Run:
    """The gradient of a choice of elements: out of place into as many zeros as there were to choose from."""

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        zeros = tape.new(numel, grads[0].width, "new_zeros")
        out = tape.new(zeros.numel, zeros.width, name)
        del saved
        return (out,)

    return run


def grouped_product(tape: Tape, x: Tensor, weight: Tensor, outputs: int, offsets: Tensor, *, inputs: int) -> Tensor:
    """`grouped_mm`: rows of x [..., inputs] by the [inputs, outputs] matrix of their group, in the dtype of the matrices."""
    x = cast(tape, x, weight.width)
    of_x, of_weight = x.numel, weight.numel
    operations = 2 * of_x * outputs

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * operations)
        second = tape.new(of_weight, grads[0].width, "_grouped_mm")
        first = tape.new(of_x, grads[0].width, "_grouped_mm")
        del saved
        return (first, second)

    node = tape.node((x, weight), run, x, weight, offsets)
    tape.compute(operations)
    return tape.new(of_x // inputs * outputs, weight.width, "_grouped_mm", node)
