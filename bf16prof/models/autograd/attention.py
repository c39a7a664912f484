"""Scaled dot product attention: which kernel CUDA chooses, what it keeps and what its backward
needs, without torch.

The conditions are those of `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` for contiguous
heads (`dry_run/hardware/cuda_operators/attention.py` has all of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.kernels import AttentionCall, KernelCall, blocks, scratch_bytes
from bf16prof.models.autograd.operators import FP32, autocast, cast, contiguous, mul, product, softmax, strided, swapped
from bf16prof.models.autograd.tape import STRIDED, GraphNode, Tape, Tensor
from bf16prof.profiles.gpus import FIRST_WITH_BF16, has_small_shared_memory
from bf16prof.rounding import round_up

SEED_BYTES = 8
FLASH_ALIGNMENT = 8


@dataclass(frozen=True)
class Heads:
    """The shape of an attention: heads of queries and of keys, positions, elements of a head, the
    GPU's kind (`None`: a CPU)."""

    batch: int
    queries: int
    keys: int
    sequence: int
    head_dim: int
    capability: tuple[int, int] | None

    @property
    def rows(self) -> int:
        """Rows of the score matrices of all heads."""
        return self.batch * self.queries * self.sequence

    @property
    def operations(self) -> int:
        """Of the two products with all sequence x sequence scores, whatever the mask leaves out."""
        return 2 * 2 * self.rows * self.sequence * self.head_dim


def backend(heads: Heads, element: int, *, is_bf16: bool = True) -> str:
    """The kernel that runs it: `cudnn`, `flash`, `efficient`, `math`, or `cpu`. `is_bf16`: whether
    elements of two bytes are bf16."""
    capability, half, grouped = heads.capability, element < FP32, heads.queries != heads.keys
    if capability is None:
        return "cpu"
    if capability < FIRST_WITH_BF16:
        return "math" if grouped or (half and (is_bf16 or heads.head_dim % 8)) else "efficient"
    cudnn = half and heads.head_dim % 8 == 0 and heads.sequence > 1 and heads.head_dim <= (256 if capability == (9, 0) else 128)
    flash = half and heads.head_dim <= 256 and not _too_wide(heads, capability)
    efficient = not grouped and heads.head_dim % (8 if half else 4) == 0
    if capability[0] in (9, 10) and cudnn:
        return "cudnn"
    return "flash" if flash else "efficient" if efficient else "math"


def _too_wide(heads: Heads, capability: tuple[int, int]) -> bool:
    return has_small_shared_memory(capability) and 192 < heads.head_dim <= 224


def attention(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    """Causal `scaled_dot_product_attention`, of the shape of the query."""
    value, key, query = (autocast(tape, each) for each in (value, key, query))
    return _attention(tape, query, key, value, heads)


def _attention(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    kernel = backend(heads, query.itemsize, is_bf16=not tape.precision.is_fp16)
    if kernel == "math":
        return _math(tape, query, key, value, heads)
    name = {"cpu": "_scaled_dot_product_flash_attention_for_cpu"}.get(kernel, f"_scaled_dot_product_{kernel}_attention")
    padded = -heads.head_dim % FLASH_ALIGNMENT if kernel == "flash" else 0
    if padded:
        query, key, value = (_padded(tape, each, heads.head_dim, padded) for each in (query, key, value))
    sizes = query.numel, key.numel, value.numel

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * heads.operations)
        out = [tape.new(size, grads[0].itemsize, f"{name}_backward") for size in sizes]
        tape.touch(_backward_scratch(tape, kernel, heads, grads[0].itemsize), f"{name}_backward")
        del saved
        return out

    node = tape.node((query, key, value), run, query, key, value)
    tape.compute(heads.operations)
    out = tape.new(query.numel, query.itemsize, name, node)
    tape.touch(_forward_scratch(tape, kernel, heads, query.itemsize), name)
    kept = [tape.new(_statistics(kernel, heads), FP32, name)]
    if kernel != "cpu":
        kept += [tape.new(1 + (kernel == "flash"), SEED_BYTES, name), tape.new(1, SEED_BYTES, name)]
    tape.save(node, tape.detached(out), *kept)
    return _cut(tape, out, heads.head_dim, padded) if padded else out


def _padded(tape: Tape, x: Tensor, head_dim: int, padding: int) -> Tensor:
    numel = x.numel
    node = tape.node((x,), lambda _, grads: (tape.new(numel, grads[0].itemsize, "constant_pad_nd"),))
    return tape.new(numel // head_dim * (head_dim + padding), x.itemsize, "constant_pad_nd", node)


def _cut(tape: Tape, x: Tensor, head_dim: int, padding: int) -> Tensor:
    """`out[..., :head_dim]`, a view."""
    whole = x.numel
    node = tape.node((x,), lambda _, grads: (tape.new(whole, grads[0].itemsize, "slice_backward"),))
    return Tensor(x.storage, whole // (head_dim + padding) * head_dim, x.itemsize, node, layout=STRIDED)


def _statistics(kernel: str, heads: Heads) -> int:
    """Elements of the logarithms of the rows' sums; the memory-efficient kernel rounds the rows up
    to 32 (kernel_forward.h, kAlignLSE)."""
    if kernel == "efficient":
        return heads.batch * heads.queries * round_up(heads.sequence, 32)
    return heads.rows


def _scratch(tape: Tape, kernel: str, heads: Heads, element: int, *copies: int) -> int:
    """What a kernel of attention allocates for itself (`bf16prof.kernels`)."""
    head_dim, length = heads.head_dim, heads.sequence
    shape = AttentionCall(heads.batch, heads.queries, length, head_dim, heads.keys, length, head_dim, element)
    return scratch_bytes(KernelCall(kernel, (*shape, *copies)), tape.processor)


def _forward_scratch(tape: Tape, kernel: str, heads: Heads, element: int) -> int:
    return _scratch(tape, FORWARD[kernel], heads, element) if kernel in FORWARD else 0


def _backward_scratch(tape: Tape, kernel: str, heads: Heads, element: int) -> int:
    return _scratch(tape, BACKWARD[kernel], heads, element, 0) if kernel in BACKWARD else 0


FORWARD = {"efficient": "efficient attention"}
BACKWARD = {
    "cudnn": "cuDNN attention, backward",
    "flash": "flash attention, backward",
    "efficient": "efficient attention, backward",
}


def _math(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    """`_scaled_dot_product_attention_math`, in fp32."""
    given = query.itemsize
    with tape.without_autocast():
        query, key, value = cast(tape, query, FP32), cast(tape, key, FP32), cast(tape, value, FP32)
        return _in_full(tape, query, key, value, heads, given=given)


def _in_full(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads, *, given: int) -> Tensor:
    """The score matrices in full, and every head with its own keys and values."""
    itemsize, scores = query.itemsize, heads.rows * heads.sequence
    scaled = strided(mul(tape, query))
    mask = _causal_mask(tape, heads.sequence**2, itemsize)
    key, value = repeated(tape, key, query.numel), repeated(tape, value, query.numel)
    keys = mul(tape, key)
    keys.layout = key.layout
    rows = head_by_head(tape, scaled, heads.batch)
    products = product(tape, rows, head_by_head(tape, keys, heads.batch), scores, inner=heads.head_dim, transposed=True)
    del rows, keys
    masked = tape.new(scores, itemsize, "add", tape.node((products,), lambda _, grads: grads))
    del products
    weights = softmax(tape, masked, name="_safe_softmax")
    tape.touch(blocks(scores, heads.rows), "_safe_softmax")
    del masked
    returned = cast(tape, tape.detached(weights), given)
    out = product(tape, weights, head_by_head(tape, value, heads.batch), query.numel, inner=heads.sequence)
    out = cast(tape, by_position(tape, out, heads.batch), given)
    del mask, scaled, returned
    return out


def _causal_mask(tape: Tape, numel: int, itemsize: int) -> Tensor:
    whole = tape.new(numel, 1, "ones")
    lower = tape.new(numel, 1, "tril")
    del whole
    mask = tape.new(numel, itemsize, "where")
    del lower
    return mask


def head_by_head(tape: Tape, x: Tensor, batch: int) -> Tensor:
    """The matrices of all heads of all sequences in one dimension: of one sequence a view."""
    return x if batch == 1 else contiguous(tape, x)


def by_position(tape: Tape, x: Tensor, batch: int) -> Tensor:
    """The result of a matrix product by sequence and head: its gradient comes position by position,
    and is copied as `head_by_head`."""
    return strided(x) if batch == 1 else swapped(tape, x)


def repeated(tape: Tape, x: Tensor, numel: int) -> Tensor:
    """`repeat_interleave`: keys or values once for every head of the queries."""
    if x.numel == numel:
        return strided(x.view())
    size = x.numel
    node = tape.node((x,), lambda _, grads: (tape.new(size, grads[0].itemsize, "sum", None, STRIDED),))
    return tape.new(numel, x.itemsize, "clone", node)
