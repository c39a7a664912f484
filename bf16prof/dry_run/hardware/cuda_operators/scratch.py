"""What CUDA kernels allocate while they run and free before they return: no output shows it, so
fake tensors do not either.

Each function here describes a call of its operator by the numbers that its kernel's memory depends
on; `bf16prof.kernels` has the bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bf16prof.dry_run.hardware.cuda_operators.attention import HALF
from bf16prof.dry_run.hardware.cuda_operators.recurrent import contiguous_input
from bf16prof.dry_run.tracker import GPU
from bf16prof.kernels import AttentionCall, KernelCall, scratch_bytes
from bf16prof.reductions import Processor

_ATEN = torch.ops.aten


def _copies(*tensors: Tensor) -> tuple[int, ...]:
    """Bytes of the copies that `contiguous()` makes."""
    return tuple(0 if tensor.is_contiguous() else tensor.nbytes for tensor in tensors)


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: Any, **__: Any) -> KernelCall:
    return KernelCall("flash attention, backward", (*_heads(query, key, value), *_copies(grad.transpose(1, 2), out.transpose(1, 2))))


def _flash_package_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *more: Any, **_: Any) -> KernelCall:
    """Heads come after tokens here; where sequences fill one row, `starts` says where they
    begin."""
    out, _, starts = more[:3]
    copies = _copies(grad, out)
    if starts is None:
        batch, queries, heads, dim = query.shape
        call = AttentionCall(batch, heads, queries, dim, key.shape[2], key.shape[1], value.shape[-1], query.itemsize)
        return KernelCall("flash attention, backward", (*call, *copies))
    tokens, heads, dim = query.shape
    numbers = tokens, heads, dim, key.shape[1], key.shape[0], starts.numel() - 1, query.itemsize
    return KernelCall("packed flash attention, backward", (*numbers, *copies))


def _cudnn_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: Any, **__: Any) -> KernelCall:
    return KernelCall("cuDNN attention, backward", (*_heads(query, key, value), 0 if grad.stride() == out.stride() else grad.nbytes))


def _heads(query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
    batch, heads, queries, dim = query.shape
    return AttentionCall(batch, heads, queries, dim, key.shape[1], key.shape[2], value.shape[-1], query.itemsize)


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> KernelCall:
    return KernelCall("efficient attention", _heads(query, key, value))


def _efficient_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> KernelCall:
    return KernelCall("efficient attention, backward", (*_heads(query, key, value), *_copies(grad.transpose(1, 2))))


def _norm_backward(weights: int, grad: Tensor, input: Tensor, shape: list[int], *_: Any, **__: Any) -> KernelCall:
    width = math.prod(shape)
    return KernelCall("norm, backward", (input.numel() // width, width, input.itemsize, weights, *_copies(grad, input)))


def _embedding_backward(grad: Tensor, indices: Tensor, vocabulary: int, padding: int, by_frequency: bool, **_: Any) -> KernelCall:
    numbers = indices.numel(), grad.shape[-1], vocabulary, by_frequency, indices.itemsize, grad.itemsize
    return KernelCall("embedding, backward", (*numbers, *_copies(grad, indices)))


def _softmax_backward(grad: Tensor, output: Tensor, *_: Any, **__: Any) -> KernelCall:
    """`softmax_backward_cuda_out` (cuda/SoftMax.cu): the product of both."""
    return _allocations(grad.numel() * max(grad.itemsize, output.itemsize))


def _safe_softmax(input: Tensor, dim: int, *_: Any, **__: Any) -> KernelCall:
    """`_safe_softmax` (transformers/attention.cpp): which scores are masked, and in which rows all
    are."""
    return _allocations(input.numel(), input.numel() // max(input.shape[dim], 1))


def _reduction(input: Tensor, dims: Any = None, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> KernelCall:
    result = dtype or (input.dtype if input.dtype.is_floating_point else torch.int64)
    as_it_is = input.dtype is result or (input.dtype in HALF and result is torch.float32)
    cast = 0 if as_it_is else input.numel() * result.itemsize
    dtype = input.dtype if as_it_is else result
    reduced = [dim % input.dim() for dim in dims] if isinstance(dims, list | tuple) and len(dims) else range(input.dim())
    in_output = dtype not in HALF or result is torch.float32
    numbers = cast, dtype.itemsize, 8 if dtype.itemsize == 2 else 4, in_output, input.dim()
    return KernelCall("reduction", (*numbers, *input.shape, *input.stride(), *reduced))


def _norm(input: Tensor, order: Any = 2, dims: Any = None, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> KernelCall:
    return _reduction(input, dims, dtype=dtype)


def _contiguous_arguments(*args: Any, **_: Any) -> KernelCall:
    return _allocations(*_copies(*(each for each in args if isinstance(each, Tensor))))


def _recurrent(*args: Any, **_: Any) -> KernelCall:
    return _allocations(contiguous_input(*args))


def _allocations(*sizes: int) -> KernelCall:
    return KernelCall("allocations", sizes)


CALLS: Mapping[Any, Callable[..., KernelCall]] = {
    _ATEN._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _ATEN._flash_attention_backward.default: _flash_package_backward,
    _ATEN._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    _ATEN._scaled_dot_product_efficient_attention.default: _efficient_forward,
    _ATEN._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _ATEN.native_layer_norm.default: _contiguous_arguments,
    _ATEN.native_layer_norm_backward.default: functools.partial(_norm_backward, 2),
    _ATEN._fused_rms_norm.default: _contiguous_arguments,
    _ATEN._fused_rms_norm_backward.default: functools.partial(_norm_backward, 1),
    _ATEN.embedding_dense_backward.default: _embedding_backward,
    _ATEN._softmax.default: _contiguous_arguments,
    _ATEN._softmax_backward_data.default: _softmax_backward,
    _ATEN._log_softmax.default: _contiguous_arguments,
    _ATEN._log_softmax_backward_data.default: _contiguous_arguments,
    _ATEN._safe_softmax.default: _safe_softmax,
    _ATEN.sum.default: _reduction,
    _ATEN.sum.dim_IntList: _reduction,
    _ATEN.mean.default: _reduction,
    _ATEN.mean.dim: _reduction,
    _ATEN.linalg_vector_norm.default: _norm,
    _ATEN._cudnn_rnn.default: _recurrent,
}
"""By operator, what describes a call of its kernel."""


def kernel_call(operator: Any, args: Any, kwargs: Any) -> KernelCall | None:
    """The call of a kernel that allocates on the simulated GPU while it runs; `None` of any
    other."""
    describe = CALLS.get(operator)
    return describe(*args, **kwargs) if describe is not None and args[0].device == GPU else None


def cuda_scratch(processor: Processor) -> dict[Any, Callable[..., int]]:
    """By operator, the bytes that kernels on such a GPU allocate while they run, beyond their
    outputs; called with the operator's arguments."""

    def scratch_of(operator: Any) -> Callable[..., int]:
        def scratch(*args: Any, **kwargs: Any) -> int:
            call = kernel_call(operator, args, kwargs)
            return scratch_bytes(call, processor) if call else 0

        return scratch

    return {operator: scratch_of(operator) for operator in CALLS}
