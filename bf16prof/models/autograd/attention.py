"""Scaled dot product attention: which kernel CUDA chooses, what it keeps and what its backward needs, without torch.

The conditions are those of `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` for contiguous heads
(`dry_run/hardware/cuda_operators/attention.py` has all of them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bf16prof.kernels import AttentionCall, KernelCall, blocks, scratch_bytes
from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.operators import FP32, autocast, cast, contiguous, mul, product, softmax, strided, swapped
from bf16prof.models.autograd.pointwise import dropout
from bf16prof.models.autograd.tape import CONTIGUOUS, EXPANDED, STRIDED, GraphNode, Tape, Tensor
from bf16prof.profiles.gpus import FIRST_WITH_BF16
from bf16prof.rounding import round_up

SEED_BYTES = 8
FLASH_ALIGNMENT = 8
MASK_ALIGNMENT = 8


@dataclass(frozen=True)
class Heads:
    """The shape of an attention: heads of queries and of keys, positions, width of a head, the GPU's kind (`None`: a CPU), dropout."""

    batch: int
    queries: int
    keys: int
    sequence: int
    width: int
    capability: tuple[int, int] | None
    dropout: float = 0.0
    enable_gqa: bool = True
    """Whether kernels may be told that heads of keys are shared: they do not share them by themselves."""
    is_by_head: bool = False
    """Whether queries and keys lie in memory head by head, not position by position: kernels of half precision answer in that order."""

    @property
    def ungrouped(self) -> Heads:
        """With keys and values repeated for every head of the queries."""
        return dataclasses.replace(self, keys=self.queries)

    @property
    def rows(self) -> int:
        """Rows of the score matrices of all heads."""
        return self.batch * self.queries * self.sequence

    @property
    def operations(self) -> int:
        """Of the two products with all sequence x sequence scores, whatever the mask leaves out."""
        return 2 * 2 * self.rows * self.sequence * self.width


def backend(heads: Heads, element: int, *, is_bf16: bool = True, has_mask: bool = False) -> str:
    """The kernel that runs it: `cudnn`, `flash`, `efficient`, `math`, or `cpu`. `is_bf16`: whether elements of two bytes are bf16."""
    capability, half, grouped = heads.capability, element < FP32, heads.queries != heads.keys
    if capability is None:
        return "cpu"
    if grouped and not heads.enable_gqa:
        return "math"
    if capability < FIRST_WITH_BF16:
        return "math" if grouped or (half and (is_bf16 or heads.width % 8)) else "efficient"
    cudnn = half and heads.width % 8 == 0 and heads.sequence > 1 and heads.width <= (256 if capability == (9, 0) else 128)
    flash = half and heads.width <= 256 and not has_mask and not _too_wide(heads, capability)
    efficient = not grouped and heads.width % (8 if half else 4) == 0
    if capability[0] in (9, 10) and cudnn and (heads.dropout * 16).is_integer():
        return "cudnn"
    return "flash" if flash else "efficient" if efficient else "math"


def _too_wide(heads: Heads, capability: tuple[int, int]) -> bool:
    small = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    return small and heads.width > 192 and (heads.width <= 224 or heads.dropout > 0)


def attention(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads, *, mask: Tensor | None = None) -> Tensor:
    """Causal `scaled_dot_product_attention`, or that with a mask [sequence, sequence], of the shape of the query."""
    value, key, query = (autocast(tape, each) for each in (value, key, query))
    return _attention(tape, query, key, value, heads, mask=mask)


def _additive(tape: Tape, mask: Tensor, heads: Heads, width: int, kernel: str) -> Tensor:
    """`convert_boolean_attn_mask`, and `preprocess_mask` of the memory-efficient kernel, which pads rows to multiples of 8."""
    if mask.width == 1:
        mask = tape.new(heads.batch * heads.sequence**2, width, "where")
    missing = -heads.sequence % MASK_ALIGNMENT
    if kernel == "efficient" and missing:
        return tape.new(mask.numel // heads.sequence * (heads.sequence + missing), width, "constant_pad_nd")
    return mask


def _attention(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads, *, mask: Tensor | None) -> Tensor:
    kernel = backend(heads, query.width, is_bf16=not tape.precision.is_fp16, has_mask=mask is not None)
    if mask is not None:
        mask = _additive(tape, mask, heads, query.width, kernel)
    if kernel == "math":
        return _math(tape, query, key, value, heads, mask=mask)
    name = {"cpu": "_scaled_dot_product_flash_attention_for_cpu"}.get(kernel, f"_scaled_dot_product_{kernel}_attention")
    padded = -heads.width % FLASH_ALIGNMENT if kernel == "flash" else 0
    if padded:
        query, key, value = (_padded(tape, each, heads.width, padded) for each in (query, key, value))
    order = STRIDED if heads.is_by_head and kernel in {"cudnn", "flash"} else CONTIGUOUS
    sizes = ((query.numel, order), (key.numel, order), (value.numel, CONTIGUOUS))

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * heads.operations)
        out = [tape.new(size, grads[0].width, f"{name}_backward", None, layout) for size, layout in sizes]
        tape.touch(_backward_scratch(tape, kernel, heads, grads[0].width), f"{name}_backward")
        del saved
        return out

    node = tape.node((query, key, value), run, query, key, value, mask)
    tape.compute(heads.operations)
    out = tape.new(query.numel, query.width, name, node, order)
    tape.touch(_forward_scratch(tape, kernel, heads, query.width), name)
    kept = [tape.new(_statistics(kernel, heads), FP32, name)]
    if kernel != "cpu":
        kept += [tape.new(1 + (kernel == "flash"), SEED_BYTES, name), tape.new(1, SEED_BYTES, name)]
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
        return heads.batch * heads.queries * round_up(heads.sequence, 32)
    return heads.rows


def _scratch(tape: Tape, kernel: str, heads: Heads, element: int, *copies: int) -> int:
    """What a kernel of attention allocates for itself (`bf16prof.kernels`)."""
    width, length = heads.width, heads.sequence
    shape = AttentionCall(heads.batch, heads.queries, length, width, heads.keys, length, width, element)
    return scratch_bytes(KernelCall(kernel, (*shape, *copies)), tape.processor)


def _forward_scratch(tape: Tape, kernel: str, heads: Heads, element: int) -> int:
    return _scratch(tape, FORWARD[kernel], heads, element) if kernel in FORWARD else 0


def _backward_scratch(tape: Tape, kernel: str, heads: Heads, element: int) -> int:
    """Where answers lie head by head and their gradients position by position, one of the two is copied."""
    if kernel not in BACKWARD:
        return 0
    relaid = heads.rows * heads.width * element if heads.is_by_head and kernel != "efficient" else 0
    return _scratch(tape, BACKWARD[kernel], heads, element, relaid)


FORWARD = {"efficient": "efficient attention"}
BACKWARD = {
    "cudnn": "cuDNN attention, backward",
    "flash": "flash attention, backward",
    "efficient": "efficient attention, backward",
}


def _math(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads, *, mask: Tensor | None) -> Tensor:
    """`_scaled_dot_product_attention_math`, in fp32."""
    given = query.width
    with tape.without_autocast():
        query, key, value = cast(tape, query, FP32), cast(tape, key, FP32), cast(tape, value, FP32)
        return _in_full(tape, query, key, value, heads, mask=mask, given=given)


def _in_full(tape: Tape, query: Tensor, key: Tensor, value: Tensor, heads: Heads, *, mask: Tensor | None, given: int) -> Tensor:
    """The score matrices in full, and every head with its own keys and values, which matrix products repeat where nothing else does."""
    width, scores = query.width, heads.rows * heads.sequence
    scaled = mul(tape, query) if heads.is_by_head else strided(mul(tape, query))
    if mask is None:
        mask = _causal_mask(tape, heads.sequence**2, width)
    if heads.enable_gqa:
        key, value = repeated(tape, key, query.numel, is_by_head=heads.is_by_head), repeated(tape, value, query.numel)
    keys = mul(tape, key)
    keys.layout = key.layout
    rows = head_by_head(tape, scaled, heads.batch)
    products = product(tape, rows, _of_all_heads(tape, keys, query.numel, heads), scores, inner=heads.width, transposed=True)
    del rows, keys
    masked = tape.new(scores, width, "add", tape.node((products,), lambda _, grads: grads))
    del products
    weights = softmax(tape, masked, name="_safe_softmax")
    tape.touch(blocks(scores, heads.rows), "_safe_softmax")
    del masked
    weights = dropout(tape, weights, heads.dropout)
    returned = cast(tape, tape.detached(weights), given)
    out = product(tape, weights, _of_all_heads(tape, value, query.numel, heads), query.numel, inner=heads.sequence)
    out = cast(tape, by_position(tape, out, heads.batch), given)
    del mask, scaled, returned
    return out


def _of_all_heads(tape: Tape, x: Tensor, numel: int, heads: Heads) -> Tensor:
    return head_by_head(tape, x if x.numel == numel else expanded(tape, x, numel), heads.batch)


def _causal_mask(tape: Tape, numel: int, width: int) -> Tensor:
    whole = tape.new(numel, 1, "ones")
    lower = tape.new(numel, 1, "tril")
    del whole
    mask = tape.new(numel, width, "where")
    del lower
    return mask


def matrix_product(tape: Tape, a: Tensor, b: Tensor, numel: int, batch: int, *, inner: int, transposed: bool = False) -> Tensor:
    """`matmul` of the matrices of all heads over a common dimension of `inner`, copied where they do not lie head by head."""
    right, left = autocast(tape, b), autocast(tape, a)
    a, b = head_by_head(tape, left, batch), head_by_head(tape, right, batch)
    return product(tape, a, b, numel, inner=inner, transposed=transposed)


def in_order(x: Tensor) -> Tensor:
    """A view that matrix products of heads need not copy."""
    out = x.view()
    out.layout = CONTIGUOUS
    return out


def head_by_head(tape: Tape, x: Tensor, batch: int) -> Tensor:
    """The matrices of all heads of all sequences in one dimension: of one sequence a view."""
    return x if batch == 1 else contiguous(tape, x)


def by_position(tape: Tape, x: Tensor, batch: int) -> Tensor:
    """The result of a matrix product by sequence and head: its gradient comes position by position, and is copied as `head_by_head`."""
    return strided(x) if batch == 1 else swapped(tape, x)


def expanded(tape: Tape, x: Tensor, numel: int) -> Tensor:
    """A view that repeats the one head of keys or values, of which the gradients are summed."""
    size = x.numel
    node = tape.node((x,), lambda _, grads: (tape.new(size, grads[0].width, "sum"),))
    return Tensor(x.storage, numel, x.width, node, layout=EXPANDED)


def repeated(tape: Tape, x: Tensor, numel: int, *, is_by_head: bool = False, is_copied: bool = False) -> Tensor:
    """`repeat_interleave`: keys or values once for every head of the queries; copied even where there is one for each."""
    if x.numel == numel and not is_copied:
        return in_order(x) if is_by_head else strided(x.view())
    size = x.numel
    return tape.new(numel, x.width, "clone", tape.node((x,), lambda _, grads: (tape.new(size, grads[0].width, "sum", None, STRIDED),)))
