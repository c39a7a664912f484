"""Scaled dot product attention: which kernel CUDA chooses, what it keeps and what its backward needs, without torch.

The conditions are those of `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` for contiguous heads, no mask and no dropout
(`simulate/hardware/cuda_operators/attention.py` has all of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.models.autograd.operators import FP32, autocast, contiguous, mul, product, softmax, strided
from bf16prof.models.autograd.tape import CONTIGUOUS, STRIDED, Node, Tape, Tensor

BLOCK = 512
SEED_BYTES = 8
FLASH_ROWS = 128
FLASH_ALIGNMENT = 8


@dataclass(frozen=True)
class Heads:
    """The shape of an attention: heads of queries and of keys, positions, width of a head, and what runs it (`None`: a CPU)."""

    batch: int
    queries: int
    keys: int
    sequence: int
    width: int
    capability: tuple[int, int] | None

    @property
    def rows(self) -> int:
        """Rows of the score matrices of all heads."""
        return self.batch * self.queries * self.sequence

    @property
    def operations(self) -> int:
        """Of the two products with all sequence x sequence scores, whatever the mask leaves out."""
        return 2 * 2 * self.rows * self.sequence * self.width


def backend(heads: Heads, element: int) -> str:
    """The kernel that runs it: `cudnn`, `flash`, `efficient`, `math`, or `cpu`."""
    capability, half, grouped = heads.capability, element < FP32, heads.queries != heads.keys
    if capability is None:
        return "cpu"
    cudnn = half and heads.width % 8 == 0 and heads.sequence > 1 and heads.width <= (256 if capability == (9, 0) else 128)
    flash = half and heads.width <= 256 and not ((8, 6) <= capability <= (8, 9) and 192 < heads.width <= 224)
    efficient = not grouped and heads.width % (8 if half else 4) == 0
    if capability[0] in (9, 10) and cudnn:
        return "cudnn"
    return "flash" if flash else "efficient" if efficient else "math"


def attention(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    """Causal `scaled_dot_product_attention`, of the shape of the query."""
    return _attention(tape, autocast(tape, query), autocast(tape, key), autocast(tape, value), heads)


def _attention(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    kernel = backend(heads, query.width)
    if kernel == "math":
        return _math(tape, query, key, value, heads)
    name = {"cpu": "_scaled_dot_product_flash_attention_for_cpu"}.get(kernel, f"_scaled_dot_product_{kernel}_attention")
    padded = -heads.width % FLASH_ALIGNMENT if kernel == "flash" else 0
    if padded:
        query, key, value = (_padded(tape, each, heads.width, padded) for each in (query, key, value))
    sizes = (query.numel, key.numel, value.numel)

    def run(node: Node, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * heads.operations)
        out = [tape.new(size, grads[0].width, f"{name}_backward") for size in sizes]
        tape.touch(_backward_scratch(kernel, heads, grads[0].width), f"{name}_backward")
        del saved
        return out

    node = tape.node((query, key, value), run, query, key, value)
    tape.compute(heads.operations)
    out = tape.new(query.numel, query.width, name, node)
    kept = [tape.new(_statistics(kernel, heads), FP32, name)]
    if kernel != "cpu":
        kept += [tape.new(1, SEED_BYTES, name) for _ in range(2)]
    tape.save(node, tape.detached(out), *kept)
    return _cut(tape, out, heads.width, padded) if padded else out


def _padded(tape: Tape, x: Tensor, width: int, padding: int) -> Tensor:
    numel = x.numel
    node = tape.node((x,), lambda _, grads: (tape.new(numel, grads[0].width, "constant_pad_nd"),))
    return tape.new(numel // width * (width + padding), x.width, "constant_pad_nd", node)


def _cut(tape: Tape, x: Tensor, width: int, padding: int) -> Tensor:
    """`out[..., :width]`, a view."""
    whole = x.numel
    node = tape.node((x,), lambda _, grads: (tape.new(whole, grads[0].width, "slice_backward"),))
    return Tensor(x.storage, whole // (width + padding) * width, x.width, node, layout=STRIDED)


def _statistics(kernel: str, heads: Heads) -> int:
    """Elements of the logarithms of the rows' sums; the memory-efficient kernel rounds the rows up to 32 (kernel_forward.h, kAlignLSE)."""
    if kernel == "efficient":
        return heads.batch * heads.queries * (-(-heads.sequence // 32) * 32)
    return heads.rows


def _rounded(*sizes: int) -> int:
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


def _full_heads(heads: Heads, element: int) -> int:
    """Gradients of key and value before they are summed over the heads of a group."""
    return 0 if heads.queries == heads.keys else 2 * _rounded(heads.rows * heads.width * element)


def _backward_scratch(kernel: str, heads: Heads, element: int) -> int:
    """What the kernel of the backward pass allocates for itself (see `simulate/hardware/cuda_operators/scratch.py` for the sources)."""
    if kernel == "cudnn":
        return _rounded(heads.rows * heads.width * FP32, heads.rows * FP32) + _full_heads(heads, element)
    if kernel == "flash":
        rows = heads.batch * heads.queries * (-(-heads.sequence // FLASH_ROWS) * FLASH_ROWS)
        step = 32 if heads.width <= 128 else 64
        columns = -(-heads.width // step) * step
        return _rounded(rows * columns * FP32, rows * FP32) + _full_heads(heads, element)
    if kernel == "efficient":
        held = _rounded(heads.rows * FP32, _efficient_workspace(heads, element))
        return held if element < FP32 else max(held, _rounded(heads.rows * heads.width * FP32, heads.rows * FP32))
    return 0


def _efficient_workspace(heads: Heads, element: int) -> int:
    """`workspace_size` (mem_eff_attention/kernel_backward.h)."""
    dim, length = heads.width, heads.sequence
    tile = 64 if dim <= 64 else 128
    key_tile = 128 if 64 < dim <= 128 else 64
    elements = -(-length // tile) * -(-dim // tile) * (4 + tile * tile)
    if dim > tile and element < FP32:
        splits = max(1, min(-(-length // key_tile), 200 // (heads.batch * heads.queries)))
        elements += splits * key_tile * 2 * (-(-dim // tile) * tile)
    return heads.batch * heads.queries * (-(-elements // 4) * 4) * FP32


def _math(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    """`_scaled_dot_product_attention_math`: the score matrices in full, and every head with its own keys and values."""
    width, scores = query.width, heads.rows * heads.sequence
    query = strided(mul(tape, query))
    mask = _causal_mask(tape, heads.sequence**2, width)
    key, value = (_repeated(tape, each, query.numel) for each in (key, value))
    keys = mul(tape, key)
    keys.layout = key.layout
    rows = _relaid(tape, contiguous(tape, query))
    keys, value = contiguous(tape, keys), contiguous(tape, value)
    products = product(tape, rows, keys, scores, inner=heads.width, transposed=True)
    del keys  # a temporary of that expression, unlike the scaled query
    masked = tape.new(scores, width, "add", tape.node((products,), lambda _, grads: grads))
    del products, rows
    weights = softmax(tape, masked, name="_safe_softmax")
    tape.touch(_rounded(scores, heads.rows), "_safe_softmax")
    del masked
    out = product(tape, weights, value, query.numel, inner=heads.sequence)
    del mask
    return out


def _causal_mask(tape: Tape, numel: int, width: int) -> Tensor:
    whole = tape.new(numel, 1, "ones")
    lower = tape.new(numel, 1, "tril")
    del whole
    mask = tape.new(numel, width, "where")
    del lower
    return mask


def _repeated(tape: Tape, x: Tensor, numel: int) -> Tensor:
    """`repeat_interleave`: keys or values once for every head of the queries."""
    if x.numel == numel:
        return strided(x.view())
    size = x.numel
    return tape.new(numel, x.width, "clone", tape.node((x,), lambda _, grads: (tape.new(size, grads[0].width, "sum", None, STRIDED),)))


def _relaid(tape: Tape, x: Tensor) -> Tensor:
    """x, whose gradient is viewed in the layout that it had before it was copied."""

    def run(_: Node, grads: list[Any]) -> Sequence[Any]:
        grad = grads[0].view()
        grad.layout = CONTIGUOUS
        return (grad,)

    out = x.view()
    out.node, out.slot = tape.node((x,), run), 0
    return out
