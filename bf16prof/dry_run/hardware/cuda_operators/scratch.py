"""What CUDA kernels allocate while they run and free before they return: no output shows it, so fake tensors do not either.

Sources are in PyTorch's `aten/src/ATen/native`, unless said otherwise. Every function gives bytes for the arguments of its operator, and
none for tensors that are not on the simulated GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bf16prof.dry_run.hardware.cuda_operators.attention import HALF
from bf16prof.dry_run.hardware.cuda_operators.recurrent import contiguous_input
from bf16prof.dry_run.tracker import GPU
from bf16prof.kernels import EMBEDDING_ROWS_PER_THREAD, EMBEDDING_WITHOUT_SORT, FLOAT_BYTES, norm_partial_sums
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.reductions import Processor, Reduction, global_memory
from bf16prof.rounding import ceil_div, round_up

FLASH_ROWS = 128
"""`mha_bwd` rounds the queries up to it (transformers/cuda/flash_attn/flash_api.cpp)."""

_ATEN = torch.ops.aten


def _blocks(*sizes: int) -> int:
    """Bytes of so many allocations, each rounded up as the caching allocator does."""
    return sum(round_up(size, ALLOCATOR_BLOCK_BYTES) for size in sizes)


def _copies(*tensors: Tensor) -> int:
    """Bytes of the copies that `contiguous()` makes."""
    return _blocks(*(tensor.nbytes for tensor in tensors if not tensor.is_contiguous()))


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: Any, **__: Any) -> int:
    """`mha_bwd`: dQ in fp32, a sum per row, dK and dV for every head of the query; `_flash_attention_backward`: contiguous copies."""
    batch, heads, queries, dim = query.shape
    rows, columns = round_up(queries, FLASH_ROWS), round_up(dim, 32 if dim <= 128 else 64)
    sizes = [batch * heads * rows * columns * FLOAT_BYTES, batch * heads * rows * FLOAT_BYTES]
    return _blocks(*sizes) + _full_heads(query, key) + _copies(grad.transpose(1, 2), out.transpose(1, 2))


def _cudnn_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: Any, **__: Any) -> int:
    """The same in cuDNN's own terms: dQ_accum, softmax_sum, dK_fullhead and dV_fullhead, and `dO` in the layout of `O`.

    Source: include/cudnn_frontend/node/scaled_dot_product_flash_attention.h of cudnn-frontend, cudnn/MHA.cpp. What cuDNN's closed engine
    adds is not public.
    """
    batch, heads, queries, dim = query.shape
    sizes = [batch * heads * queries * dim * FLOAT_BYTES, batch * heads * queries * FLOAT_BYTES]
    return _blocks(*sizes, 0 if grad.stride() == out.stride() else grad.nbytes) + _full_heads(query, key)


def _full_heads(query: Tensor, key: Tensor) -> int:
    """Gradients of key and value before they are summed over the heads of a group."""
    batch, heads, keys, dim = *query.shape[:2], *key.shape[2:]
    return 0 if key.shape[1] == heads else 2 * _blocks(batch * heads * keys * dim * key.itemsize)


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """`kNeedsOutputAccumulatorBuffer` (transformers/cuda/mem_eff_attention/kernel_forward.h): wide heads of half precision."""
    wide = max(key.shape[-1], value.shape[-1]) > 128 and query.dtype in HALF
    return _blocks(math.prod(query.shape[:3]) * value.shape[-1] * FLOAT_BYTES) if wide else 0


def _efficient_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """`_efficient_attention_backward` (transformers/cuda/attention_backward.cu): delta and the kernel's workspace.

    In fp32 the kernel does not compute delta; then the product that is summed for it may be larger than the workspace.
    """
    delta = math.prod(query.shape[:3]) * FLOAT_BYTES
    held = _blocks(delta, _efficient_workspace(query, key, value))
    if query.dtype not in HALF:
        held = max(held, _blocks(math.prod(query.shape[:3]) * value.shape[-1] * FLOAT_BYTES, delta))
    return held + _copies(grad.transpose(1, 2))


def _efficient_workspace(query: Tensor, key: Tensor, value: Tensor) -> int:
    """`workspace_size` (mem_eff_attention/kernel_backward.h) of the kernel that `cutlassB.h` lists first for the head dimension."""
    batch, heads, queries, dim = query.shape
    widest = max(dim, value.shape[-1])
    tile = 64 if widest <= 64 else 128
    key_tile = 128 if 64 < widest <= 128 else 64
    elements = ceil_div(queries, tile) * ceil_div(dim, tile) * (4 + tile * tile)
    if widest > tile and query.dtype in HALF:
        splits = max(1, min(ceil_div(key.shape[2], key_tile), 200 // (batch * heads)))
        elements += splits * key_tile * sum(round_up(each.shape[-1], tile) for each in (query, value))
    return batch * heads * round_up(elements, 4) * FLOAT_BYTES


def _layer_norm_backward(multiprocessors: int) -> Callable[..., int]:
    """`layer_norm_backward_cuda` (cuda/layer_norm_kernel.cu)."""

    def scratch(grad: Tensor, input: Tensor, shape: list[int], *_: Any, **__: Any) -> int:
        return _copies(grad, input) + 2 * _partial_sums(input, math.prod(shape), multiprocessors)

    return scratch


def _rms_norm_backward(multiprocessors: int) -> Callable[..., int]:
    """`_fused_rms_norm_backward_cuda`, the same kernels without a bias."""

    def scratch(grad: Tensor, input: Tensor, shape: list[int], *_: Any, **__: Any) -> int:
        return _copies(grad, input) + _partial_sums(input, math.prod(shape), multiprocessors)

    return scratch


def _partial_sums(input: Tensor, width: int, multiprocessors: int) -> int:
    return _blocks(norm_partial_sums(input.numel() // width, width, input.itemsize, multiprocessors))


def _embedding_backward(grad: Tensor, indices: Tensor, vocabulary: int, padding: int, by_frequency: bool, **_: Any) -> int:
    """`embedding_dense_backward_cuda` and `embedding_backward_cuda_kernel`: sorted indices, and partial sums of rows in fp32."""
    count, width = indices.numel(), grad.shape[-1]
    copies = _copies(grad, indices)
    if count <= EMBEDDING_WITHOUT_SORT and not by_frequency:
        return copies
    segments = min(count, vocabulary)
    partial = count // EMBEDDING_ROWS_PER_THREAD + segments
    lists = [count] * (4 if by_frequency else 3) + [segments, segments, partial, 1, 1]
    return copies + _blocks(*(each * indices.itemsize for each in lists), partial * width * max(grad.itemsize, FLOAT_BYTES))


def _softmax_backward(grad: Tensor, output: Tensor, *_: Any, **__: Any) -> int:
    """`softmax_backward_cuda_out` (cuda/SoftMax.cu): the product of both."""
    return _blocks(grad.numel() * max(grad.itemsize, output.itemsize))


def _safe_softmax(input: Tensor, dim: int, *_: Any, **__: Any) -> int:
    """`_safe_softmax` (transformers/attention.cpp): which scores are masked, and in which rows all are."""
    return _blocks(input.numel(), input.numel() // max(input.shape[dim], 1))


def _reduction(processor: Processor, input: Tensor, dims: Any = None, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> int:
    """`make_reduction` (ReduceOpsUtils.h): the input in the type of the result, but for half precision into fp32; and what several
    blocks of threads write down before they are one output."""
    result = dtype or (input.dtype if input.dtype.is_floating_point else torch.int64)
    as_it_is = input.dtype is result or (input.dtype in HALF and result is torch.float32)
    cast = 0 if as_it_is else _blocks(input.numel() * result.itemsize)
    dtype = input.dtype if as_it_is else result
    every = range(input.dim())
    reduction = Reduction(
        input.shape,
        input.stride(),
        [dim % input.dim() for dim in dims] if isinstance(dims, list | tuple) and len(dims) else every,
        dtype.itemsize,
        max(dtype.itemsize, FLOAT_BYTES),
        vector=8 if dtype.itemsize == 2 else 4,
        accumulates_in_output=dtype not in HALF or result is torch.float32,
    )
    return cast + _blocks(*global_memory(reduction, processor))


def _norm(
    processor: Processor, input: Tensor, order: Any = 2, dims: Any = None, *_: Any, dtype: torch.dtype | None = None, **__: Any
) -> int:
    return _reduction(processor, input, dims, dtype=dtype)


def _contiguous_arguments(*args: Any, **_: Any) -> int:
    return _copies(*(each for each in args if isinstance(each, Tensor)))


def _on_the_gpu(scratch: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(scratch)
    def call(*args: Any, **kwargs: Any) -> int:
        return scratch(*args, **kwargs) if args[0].device == GPU else 0

    return call


def cuda_scratch(processor: Processor) -> dict[Any, Callable[..., int]]:
    """By operator, the bytes that kernels on such a GPU allocate while they run, beyond their outputs; called with the operator's
    arguments."""
    multiprocessors, reduction = processor.multiprocessors, functools.partial(_reduction, processor)
    scratch: dict[Any, Callable[..., int]] = {
        _ATEN._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        _ATEN._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
        _ATEN._scaled_dot_product_efficient_attention.default: _efficient_forward,
        _ATEN._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
        _ATEN.native_layer_norm.default: _contiguous_arguments,
        _ATEN.native_layer_norm_backward.default: _layer_norm_backward(multiprocessors),
        _ATEN._fused_rms_norm.default: _contiguous_arguments,
        _ATEN._fused_rms_norm_backward.default: _rms_norm_backward(multiprocessors),
        _ATEN.embedding_dense_backward.default: _embedding_backward,
        _ATEN._softmax.default: _contiguous_arguments,
        _ATEN._softmax_backward_data.default: _softmax_backward,
        _ATEN._log_softmax.default: _contiguous_arguments,
        _ATEN._log_softmax_backward_data.default: _contiguous_arguments,
        _ATEN._safe_softmax.default: _safe_softmax,
        _ATEN.sum.default: reduction,
        _ATEN.sum.dim_IntList: reduction,
        _ATEN.mean.default: reduction,
        _ATEN.mean.dim: reduction,
        _ATEN.linalg_vector_norm.default: functools.partial(_norm, processor),
        _ATEN._cudnn_rnn.default: contiguous_input,
    }
    return {operator: _on_the_gpu(call) for operator, call in scratch.items()}
