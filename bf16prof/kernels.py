"""Memory that CUDA's kernels ask for while they run and free before they return, as a function of
sizes alone: each fact once.

The dry run describes every call of such a kernel by numbers (`KernelCall`), and asks here for its
bytes. So does a signature that is replayed at another batch or length, or for another GPU. Nothing
here needs torch. Paths are below `aten/src/ATen/native` in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES, DEFAULT_MULTIPROCESSORS
from bf16prof.reductions import Processor, Reduction, global_memory
from bf16prof.rounding import ceil_div, round_up

FLOAT_BYTES = 4
WARP = 32
MANY_ROWS = 64 * 1024
"""More rows than that are summed in two passes, where they are narrow
(cuda/layer_norm_kernel.cu)."""
EMBEDDING_WITHOUT_SORT = 3072
"""Up to so many indices `embedding_dense_backward_cuda` needs no sort (cuda/Embedding.cu)."""
EMBEDDING_ROWS_PER_THREAD = 10
"""`NROWS_PER_THREAD` (cuda/EmbeddingBackwardKernel.cu)."""
FLASH_ROWS = 128
"""`mha_bwd` rounds the queries up to it (transformers/cuda/flash_attn/flash_api.cpp)."""


class KernelCall(NamedTuple):
    """A kernel of `SCRATCH`, and the numbers that it was called with."""

    kernel: str
    numbers: tuple[int, ...]


def scratch_bytes(call: KernelCall, processor: Processor) -> int:
    """What the call asks for at one time on such a GPU."""
    return SCRATCH[call.kernel](processor, *call.numbers)


def blocks(*sizes: int) -> int:
    """Bytes of so many allocations, each rounded up as the caching allocator does."""
    return sum(round_up(size, ALLOCATOR_BLOCK_BYTES) for size in sizes)


def norm_partial_sums(rows: int, width: int, element: int, multiprocessors: int) -> int:
    """Bytes that the backward of a norm takes for the gradient of one weight,
    `LaunchGammaBetaBackwardCUDAKernel` (cuda/layer_norm_kernel.cu): where rows are many and too
    narrow to fill half of the multiprocessors, partial sums are kept."""
    multiprocessors = multiprocessors or DEFAULT_MULTIPROCESSORS
    if rows <= MANY_ROWS or width // WARP >= multiprocessors // 2:
        return 0
    return min(32 * 1024 // ceil_div(width, WARP), ceil_div(rows, WARP)) * width * element


def _allocations(_: Processor, *sizes: int) -> int:
    """So many at a time, whatever they are for."""
    return blocks(*sizes)


class AttentionCall(NamedTuple):
    """What a kernel of attention is called with: extents, and bytes of an element."""

    batch: int
    heads: int
    queries: int
    dim: int
    key_heads: int
    keys: int
    value_dim: int
    element: int

    @property
    def rows(self) -> int:
        """One for each query of each head."""
        return self.batch * self.heads * self.queries

    @property
    def is_half(self) -> bool:
        """Whether it is half precision."""
        return self.element < FLOAT_BYTES

    @property
    def full_heads(self) -> int:
        """Gradients of key and value before they are summed over the heads of a group."""
        return 0 if self.key_heads == self.heads else 2 * blocks(self.batch * self.heads * self.keys * self.dim * self.element)

    @property
    def workspace(self) -> int:
        """`workspace_size` (mem_eff_attention/kernel_backward.h) of the kernel that `cutlassB.h`
        lists first for the head dimension."""
        widest = max(self.dim, self.value_dim)
        tile = 64 if widest <= 64 else 128
        key_tile = 128 if 64 < widest <= 128 else 64
        elements = ceil_div(self.queries, tile) * ceil_div(self.dim, tile) * (4 + tile * tile)
        if widest > tile and self.is_half:
            splits = max(1, min(ceil_div(self.keys, key_tile), 200 // (self.batch * self.heads)))
            elements += splits * key_tile * (round_up(self.dim, tile) + round_up(self.value_dim, tile))
        return self.batch * self.heads * round_up(elements, 4) * FLOAT_BYTES


EXTENTS = len(AttentionCall._fields)


def _flash_backward(_: Processor, *numbers: int) -> int:
    """`mha_bwd`: dQ in fp32, a sum per row, dK and dV for every head of the query;
    `_flash_attention_backward`: contiguous copies."""
    call, copies = AttentionCall(*numbers[:EXTENTS]), numbers[EXTENTS:]
    rows, columns = call.batch * call.heads * round_up(call.queries, FLASH_ROWS), round_up(call.dim, 32 if call.dim <= 128 else 64)
    return blocks(rows * columns * FLOAT_BYTES, rows * FLOAT_BYTES, *copies) + call.full_heads


def _packed_flash_backward(_: Processor, *numbers: int) -> int:
    """`mha_varlen_bwd`: the same for sequences that fill one row, which stand a block apart from
    each other."""
    tokens, heads, dim, key_heads, keys, sequences, element, *copies = numbers
    rows, columns = heads * (tokens + FLASH_ROWS * sequences), round_up(dim, 32 if dim <= 128 else 64)
    full_heads = 0 if key_heads == heads else 2 * blocks(keys * heads * dim * element)
    return blocks(rows * columns * FLOAT_BYTES, rows * FLOAT_BYTES, *copies) + full_heads


def _cudnn_backward(_: Processor, *numbers: int) -> int:
    """The same in cuDNN's own terms: dQ_accum, softmax_sum, dK_fullhead and dV_fullhead, and `dO`
    in the layout of `O`.

    Source: include/cudnn_frontend/node/scaled_dot_product_flash_attention.h of cudnn-frontend,
    cudnn/MHA.cpp. What cuDNN's closed engine adds is not public.
    """
    call, copies = AttentionCall(*numbers[:EXTENTS]), numbers[EXTENTS:]
    return blocks(call.rows * call.dim * FLOAT_BYTES, call.rows * FLOAT_BYTES, *copies) + call.full_heads


def _efficient_forward(_: Processor, *numbers: int) -> int:
    """`kNeedsOutputAccumulatorBuffer` (transformers/cuda/mem_eff_attention/kernel_forward.h): wide
    heads of half precision."""
    call = AttentionCall(*numbers)
    return blocks(call.rows * call.value_dim * FLOAT_BYTES) if max(call.dim, call.value_dim) > 128 and call.is_half else 0


def _efficient_backward(_: Processor, *numbers: int) -> int:
    """`_efficient_attention_backward` (transformers/cuda/attention_backward.cu): delta and the
    kernel's workspace.

    In fp32 the kernel does not compute delta; then the product that is summed for it may be larger
    than the workspace.
    """
    call, copies = AttentionCall(*numbers[:EXTENTS]), numbers[EXTENTS:]
    delta = call.rows * FLOAT_BYTES
    held = blocks(delta, call.workspace)
    return blocks(*copies) + (held if call.is_half else max(held, blocks(call.rows * call.value_dim * FLOAT_BYTES, delta)))


def _norm_backward(processor: Processor, *numbers: int) -> int:
    """`layer_norm_backward_cuda` and, with one weight less, `_fused_rms_norm_backward_cuda`
    (cuda/layer_norm_kernel.cu)."""
    rows, width, element, weights, *copies = numbers
    return blocks(*copies) + weights * blocks(norm_partial_sums(rows, width, element, processor.multiprocessors))


def _embedding_backward(_: Processor, *numbers: int) -> int:
    """`embedding_dense_backward_cuda` and `embedding_backward_cuda_kernel`: sorted indices, and
    partial sums of rows in fp32."""
    count, width, vocabulary, by_frequency, index, element, *copies = numbers
    if count <= EMBEDDING_WITHOUT_SORT and not by_frequency:
        return blocks(*copies)
    segments = min(count, vocabulary)
    partial = count // EMBEDDING_ROWS_PER_THREAD + segments
    lists = [count] * (4 if by_frequency else 3) + [segments, segments, partial, 1, 1]
    return blocks(*copies, *(each * index for each in lists), partial * width * max(element, FLOAT_BYTES))


def _reduction(processor: Processor, *numbers: int) -> int:
    """`make_reduction` (ReduceOpsUtils.h): the input in the type of the result, but for half
    precision into fp32; and what several blocks of threads write down before they are one output.
    The last numbers: the shape, the strides, and which of them are reduced."""
    cast, element, vector, in_output, dims, *extents = numbers
    shape, strides, reduced = extents[:dims], extents[dims : 2 * dims], extents[2 * dims :]
    reduction = Reduction(shape, strides, reduced, element, max(element, FLOAT_BYTES), vector, bool(in_output))
    return blocks(cast, *global_memory(reduction, processor))


SCRATCH: Mapping[str, Callable[..., int]] = {
    "allocations": _allocations,
    "flash attention, backward": _flash_backward,
    "packed flash attention, backward": _packed_flash_backward,
    "cuDNN attention, backward": _cudnn_backward,
    "efficient attention": _efficient_forward,
    "efficient attention, backward": _efficient_backward,
    "norm, backward": _norm_backward,
    "embedding, backward": _embedding_backward,
    "reduction": _reduction,
}
"""By kernel, its bytes: called with a GPU's processor and the numbers of a call."""
