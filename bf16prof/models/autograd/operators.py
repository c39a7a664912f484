"""PyTorch's operators as a `Tape` sees them: what each allocates, what it saves for backward, and
what its backward allocates.

Formulas of the derivatives are those of `tools/autograd/derivatives.yaml`; the dtypes under
autocast those of CUDA (`aten/src/ATen/autocast_mode.h`). A backward function unpacks what was saved
at its start and holds it to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bf16prof.kernels import KernelCall, scratch_bytes
from bf16prof.models.autograd.tape import CONTIGUOUS, STRIDED, VIEWABLE, GraphNode, Parameter, Tape, Tensor

FP32 = 4
TOKEN_BYTES = 8
"""Token ids and positions are int64."""


def cast(tape: Tape, x: Tensor, itemsize: int) -> Tensor:
    """`x.to(dtype)`. Its backward is the cast that the engine makes of every gradient
    (`validate_outputs`)."""
    return x if x.itemsize == itemsize else tape.new(x.numel, itemsize, "_to_copy", tape.node((x,), _same), x.layout)


def _same(_: GraphNode, grads: list[Any]) -> Sequence[Any]:
    return grads


def autocast(tape: Tape, x: Tensor) -> Tensor:
    """`cached_cast`: into autocast's dtype; a parameter's cast is kept until autocast is left."""
    itemsize = tape.precision.autocast
    if not itemsize or x.itemsize <= itemsize:
        return x
    if not isinstance(x, Parameter):
        return cast(tape, x, itemsize)
    if x.key not in tape.casts:
        tape.casts[x.key] = cast(tape, x, itemsize)
    return tape.casts[x.key]


def to_fp32(tape: Tape, x: Tensor) -> Tensor:
    """What autocast does to the inputs of operators on its fp32 list."""
    return cast(tape, x, FP32) if tape.precision.autocast and tape.precision.has_fp32_islands else x


def add(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """a + b, of which one may be repeated."""
    return tape.new(max(a.numel, b.numel), max(a.itemsize, b.itemsize), "add", tape.node((a, b), lambda _, grads: (grads[0], grads[0])))


def mul(tape: Tape, a: Tensor, b: Tensor | None = None) -> Tensor:
    """a * b, of which one may be repeated; without b, a times a number."""

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        out = [tape.new(grads[0].numel, grads[0].itemsize, "mul", None, grads[0].layout) if edge else None for edge in node.edges]
        del saved
        return out

    kept = (b if a.node else None, a if b is not None and b.node else None)
    numel, itemsize = (a.numel, a.itemsize) if b is None else (max(a.numel, b.numel), max(a.itemsize, b.itemsize))
    return tape.new(numel, itemsize, "mul", tape.node((a, b), run, *kept))


def negative(tape: Tape, x: Tensor) -> Tensor:
    """-x."""
    return tape.new(x.numel, x.itemsize, "neg", tape.node((x,), lambda _, grads: (tape.new(grads[0].numel, grads[0].itemsize, "neg"),)))


def concatenate(tape: Tape, *parts: Tensor) -> Tensor:
    """`torch.cat`, whose backward gives views; under autocast in the widest dtype of the parts."""
    itemsize = max(each.itemsize for each in parts)
    if tape.precision.autocast:
        parts = tuple(cast(tape, each, itemsize) for each in parts)
    sizes = [each.numel for each in parts]

    def run(_: GraphNode, grads: list[Any]) -> Sequence[Any]:
        return [Tensor(grads[0].storage, size, grads[0].itemsize, layout=STRIDED) for size in sizes]

    return tape.new(sum(sizes), itemsize, "cat", tape.node(parts, run))


def split(tape: Tape, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of parts of x, whose gradients are put together again."""
    total, itemsize, layout = x.numel, x.itemsize, x.layout
    node = tape.node((x,), lambda _, grads: (tape.new(total, itemsize, "cat", None, layout),))
    whole = tape.detached(x)
    return [Tensor(whole.storage, size, itemsize, node, slot, layout=layout) for slot, size in enumerate(sizes)]


def select(tape: Tape, x: Tensor, count: int) -> list[Tensor]:
    """x[0], x[1], ...: each has a gradient as large as x, and these are added up."""
    total, itemsize = x.numel, x.itemsize

    def run(_: GraphNode, grads: list[Any]) -> Sequence[Any]:
        return (tape.new(total, itemsize, "select_backward", None, STRIDED),)

    return [Tensor(x.storage, total // count, itemsize, tape.node((x,), run)) for _ in range(count)]


def activation(tape: Tape, name: str, x: Tensor) -> Tensor:
    """`gelu` or `silu`."""

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        out = tape.new(grads[0].numel, grads[0].itemsize, f"{name}_backward")
        del saved
        return (out,)

    return tape.new(x.numel, x.itemsize, name, tape.node((x,), run, x))


def layer_norm(tape: Tape, x: Tensor, hidden: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`native_layer_norm` over rows of `hidden` elements; the statistics of half-precision rows are
    kept in fp32."""
    x = to_fp32(tape, x)
    weight, bias = (None if each is None else to_fp32(tape, each) for each in (weight, bias))
    affine = (weight is not None) + (bias is not None)
    node = tape.node((x, weight, bias), _norm_backward(tape, "native_layer_norm_backward", hidden, affine))
    out = tape.new(x.numel, x.itemsize, "native_layer_norm", node)
    rows = x.numel // hidden
    mean, deviation = tape.new(rows, x.itemsize, "native_layer_norm"), tape.new(rows, x.itemsize, "native_layer_norm")
    tape.save(node, x, weight, bias, cast(tape, mean, FP32), cast(tape, deviation, FP32))
    return out


def rms_norm(tape: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """`_fused_rms_norm`."""
    x, weight = to_fp32(tape, x), to_fp32(tape, weight)
    node = tape.node((x, weight), _norm_backward(tape, "_fused_rms_norm_backward", weight.numel, 1))
    out = tape.new(x.numel, x.itemsize, "_fused_rms_norm", node)
    tape.save(node, x, weight, tape.new(x.numel // weight.numel, FP32, "_fused_rms_norm"))
    return out


def _norm_backward(tape: Tape, name: str, hidden: int, parameters: int) -> Any:
    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        size = saved[0].itemsize
        out = [tape.new(numel, size, name) for numel in (grads[0].numel, *[hidden] * parameters)]
        call = KernelCall("norm, backward", (grads[0].numel // hidden, hidden, size, parameters))
        tape.touch(scratch_bytes(call, tape.processor), name)
        del saved
        return out

    return run


def softmax(tape: Tape, x: Tensor, name: str = "_softmax") -> Tensor:
    """`_softmax` (or one of its kin), under autocast in fp32 (for bf16 by way of a copy)."""
    has_islands = tape.precision.autocast and tape.precision.has_fp32_islands
    wide = FP32 if has_islands else x.itemsize
    source = x if tape.precision.is_fp16 else cast(tape, x, wide)
    source_itemsize = source.itemsize

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        grad = tape.new(grads[0].numel, source_itemsize, "_softmax_backward_data")
        tape.touch(grads[0].bytes, "_softmax_backward_data")
        del saved
        return (grad,)

    out = tape.new(x.numel, wide, name, tape.node((source,), run))
    tape.save(out.node, tape.detached(out))
    return out


def contiguous(tape: Tape, x: Tensor) -> Tensor:
    """`x.contiguous()`, or what `reshape` makes of it."""
    return x if x.layout == CONTIGUOUS else tape.new(x.numel, x.itemsize, "clone", tape.node((x,), _same))


def strided(x: Tensor) -> Tensor:
    """x itself, seen in another order of dimensions."""
    x.layout = STRIDED
    return x


def reshaped(tape: Tape, x: Tensor) -> Tensor:
    """A view in another shape and order, whose gradient is copied where it cannot be viewed in the
    old shape."""
    return strided(viewed(tape, x))


def viewed(tape: Tape, x: Tensor) -> Tensor:
    """A view in another shape, whose gradient is copied where it cannot be viewed in the old
    one."""
    out = x.view()
    out.node, out.slot = tape.node((x,), lambda _, grads: (_viewable(tape, grads[0]),)), 0
    return out


def swapped(tape: Tape, x: Tensor) -> Tensor:
    """A matrix product's result with its dimensions swapped: the gradient comes swapped and is
    copied."""
    out = strided(x.view())
    out.node, out.slot = tape.node((x,), lambda _, grads: (tape.new(grads[0].numel, grads[0].itemsize, "clone"),)), 0
    return out


def _viewable(tape: Tape, x: Tensor) -> Tensor:
    return tape.new(x.numel, x.itemsize, "clone") if x.layout == STRIDED else x.view()


def _rows(tape: Tape, x: Tensor) -> Tensor:
    return x.view() if x.layout == CONTIGUOUS else tape.new(x.numel, x.itemsize, "clone")


def product(tape: Tape, a: Tensor, b: Tensor, numel: int, *, inner: int, transposed: bool = False) -> Tensor:
    """`bmm` of two batches of matrices over a common dimension of `inner`, of which b may be
    transposed. b's gradient comes first."""
    a, b = autocast(tape, a), autocast(tape, b)
    sizes = (a.numel, b.numel)
    operations = 2 * numel * inner

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * operations)
        of_b = tape.new(sizes[1], grads[0].itemsize, "bmm", None, VIEWABLE if transposed else STRIDED)
        of_a = tape.new(sizes[0], grads[0].itemsize, "bmm", None, STRIDED)
        del saved
        return (of_a, of_b)

    node = tape.node((a, b), run, a, b)
    tape.compute(operations)
    return tape.new(numel, a.itemsize, "bmm", node, STRIDED)


def linear(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, inputs: int, *, is_matrix: bool = False) -> Tensor:
    """`F.linear` of x [..., inputs]: `addmm` with a bias, `mm` without or where x is copied; under
    ZeRO-3 DeepSpeed's own."""
    if tape.zero3_linear:
        return _zero3_linear(tape, x, weight, bias, inputs, is_matrix=is_matrix)
    bias = None if bias is None else autocast(tape, bias)
    weight = autocast(tape, weight)
    x = autocast(tape, x)
    if bias is not None and x.layout != CONTIGUOUS:
        return _add_bias(tape, _matrix_product(tape, contiguous(tape, x), weight, inputs), bias)
    return _matrix_product(tape, x, weight, inputs, bias, is_matrix=is_matrix)


def _matrix_product(tape: Tape, x: Tensor, weight: Tensor, inputs: int, bias: Tensor | None = None, *, is_matrix: bool = False) -> Tensor:
    """Through a view of x as rows, unless it is a matrix: what is to be done with a gradient of the
    parameters comes before that of x."""
    x = x if is_matrix else viewed(tape, x)
    of_x, of_weight, of_bias = x.numel, weight.numel, 0 if bias is None else bias.numel
    operations = 2 * (of_x // inputs) * of_weight

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * operations)
        itemsize = grads[0].itemsize
        if not of_bias:
            second = tape.new(of_weight, itemsize, "mm")
            first = tape.new(of_x, itemsize, "mm")
            del saved
            return (first, second.view())  # the weight is transposed for the product, and its gradient back
        first, second = tape.new(of_x, itemsize, "mm"), tape.new(of_weight, itemsize, "mm")
        del saved
        return (_sum_of_rows(tape, grads[0].numel, of_bias, itemsize), first, second.view())

    node = tape.node((x, weight) if bias is None else (bias, x, weight), run, x, weight)
    tape.compute(operations)
    return tape.new(of_x // inputs * (of_weight // inputs), x.itemsize, "mm" if bias is None else "addmm", node)


def _sum_of_rows(tape: Tape, numel: int, columns: int, itemsize: int, out_itemsize: int | None = None) -> Tensor:
    """The gradient of a bias: the sum over the rows of [numel / columns, columns]. Where several
    blocks of threads share a column, they leave their parts in global memory until the sum is done
    (`reductions.py`)."""
    out_itemsize = out_itemsize or itemsize
    out = tape.new(columns, out_itemsize, "sum")
    is_half = itemsize < FP32
    numbers = 0, itemsize, 8 if is_half else 4, not is_half or out_itemsize == FP32, 2, numel // columns, columns, columns, 1, 0
    if scratch := scratch_bytes(KernelCall("reduction", numbers), tape.processor):
        tape.touch(scratch, "sum")
    return out


def _add_bias(tape: Tape, x: Tensor, bias: Tensor) -> Tensor:
    rows = bias.numel
    node = tape.node((x, bias), lambda _, grads: (grads[0], _sum_of_rows(tape, grads[0].numel, rows, grads[0].itemsize)))
    return tape.new(x.numel, x.itemsize, "add", node)


def _zero3_linear(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, inputs: int, *, is_matrix: bool) -> Tensor:
    """`LinearFunctionForZeroStage3`: saves its arguments as they came, and casts and copies them
    again in backward."""
    half = tape.precision.autocast
    of_x, of_weight, of_bias = x.numel, weight.numel, 0 if bias is None else bias.numel
    operations = 2 * (of_x // inputs) * of_weight
    is_view = not isinstance(weight, Parameter)

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * operations)
        itemsize = half or grads[0].itemsize
        weight = cast(tape, tape.detached(saved[1]), itemsize)
        first = _product_with(tape, grads[0], itemsize, of_x, "mm")
        if is_view:
            del weight  # autocast caches casts of parameters only
        copied = _rows(tape, grads[0])
        grad = cast(tape, copied, itemsize)
        rows = _rows(tape, tape.detached(saved[0]))
        x = cast(tape, rows, itemsize)
        second = tape.new(of_weight, itemsize, "mm")
        del x, rows, grad, copied
        third = _sum_of_rows(tape, grads[0].numel, of_bias, grads[0].itemsize, FP32 if half else None) if of_bias else None
        del saved
        grads.clear()  # a function in Python does not hold them until they are validated
        return (first, second, third) if of_bias else (first, second)

    fused = is_matrix and bias is not None
    node = tape.node((x, weight) if bias is None else (x, weight, bias), run)
    casts = [cast(tape, tape.detached(each), half) for each in ((bias, weight) if fused else (weight,)) if half and each is not None]
    numel = of_x // inputs * (of_weight // inputs)
    tape.compute(operations)
    out = _product_with(tape, tape.detached(x), half or x.itemsize, numel, "addmm" if fused else "mm", node=node)
    del casts
    tape.save(node, x, weight, bias)
    return out


def _product_with(tape: Tape, x: Tensor, itemsize: int, numel: int, name: str, *, node: GraphNode | None = None) -> Tensor:
    """A matrix product with x, cast and copied for it if need be."""
    narrow = cast(tape, tape.detached(x), itemsize)
    rows = _rows(tape, narrow)
    out = tape.new(numel, itemsize, name, node)
    del rows, narrow
    return out


def embedding(tape: Tape, weight: Tensor, rows: int, hidden: int, indices: Tensor | None = None) -> Tensor:
    """Rows of a table, by indices that are kept (`None`: the loop's own); its gradient is as large
    as the table."""
    table = weight.numel

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        grad = tape.new(table, grads[0].itemsize, "embedding_dense_backward")
        call = KernelCall("embedding, backward", (rows, hidden, table // hidden, 0, TOKEN_BYTES, grads[0].itemsize))
        tape.touch(scratch_bytes(call, tape.processor), "embedding_dense_backward")
        del saved
        return (grad,)

    return tape.new(rows * hidden, weight.itemsize, "embedding", tape.node((weight,), run, indices))


def cross_entropy(tape: Tape, logits: Tensor) -> Tensor:
    """`cross_entropy`: the loss keeps log-probabilities, in fp32 under autocast."""
    kept = cast(tape, logits, FP32) if tape.precision.autocast else logits
    wide, numel = kept.itemsize, kept.numel

    def of_logits(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        grad = tape.new(numel, wide, "_log_softmax_backward_data")
        del saved
        return (grad,)

    def of_loss(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        grad = tape.new(numel, wide, "nll_loss_backward")
        del saved
        return (grad,)

    probabilities = tape.new(numel, wide, "_log_softmax", tape.node((kept,), of_logits))
    tape.save(probabilities.node, tape.detached(probabilities))
    node = tape.node((probabilities,), of_loss, tape.detached(probabilities))
    loss = tape.new(1, wide, "nll_loss_forward", node)
    tape.save(node, tape.new(1, wide, "nll_loss_forward"))
    return loss


def row_mean(tape: Tape, x: Tensor, rows: int) -> Tensor:
    """The mean of each of so many rows; every element's gradient is written out."""
    numel = x.numel
    return tape.new(rows, x.itemsize, "mean", tape.node((x,), lambda _, grads: (tape.new(numel, grads[0].itemsize, "div"),)))
