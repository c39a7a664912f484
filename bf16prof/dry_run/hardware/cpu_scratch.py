"""What kernels on the CPU allocate while they run and free before they return: fake tensors do not,
and it sets the peaks of small models.

Every formula is read off PyTorch's source (each docstring names its file, in `aten/src/ATen/native`
unless said otherwise); no number is fitted. What comes from PyTorch's own allocator counts, so
MKL's buffers and the stack do not.

oneDNN cuts a matrix product in half precision into blocks by instruction set, caches and threads,
which no formula here covers. PyTorch is `asked` instead: it runs the product once, on tensors of
the same layout that nobody fills.

Ranks and dry run must have the same number of threads (`torch.set_num_threads`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bf16prof.dry_run.hardware.asking import ASKED_BYTES, Layout, layout, peak_bytes

HALF = (torch.bfloat16, torch.float16)
FLOAT_BYTES = 4
NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""Dtypes of the tensors of 0 dimensions that Python's numbers become (aten/src/ATen/ScalarOps.h,
scalar_to_tensor)."""

KEY_BLOCK = 512
"""Columns of the attention matrix at a time (cpu/FlashAttentionKernel.cpp,
flash_attention_kernel_impl)."""

Number = bool | int | float

_ATEN, _C10D = torch.ops.aten, torch.ops.c10d


def _copy(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of a dense copy, in another dtype if one is given."""
    return int(tensor.numel() * (dtype or tensor.dtype).itemsize)


def _contiguous(tensor: Tensor) -> int:
    """Bytes of the copy that `contiguous()` makes."""
    return 0 if tensor.is_contiguous() else _copy(tensor)


def _common(first: Tensor | Number, second: Tensor | Number) -> torch.dtype:
    """`torch.result_type`, which takes its time, for the usual cases."""
    if isinstance(first, Tensor):
        if isinstance(second, Tensor) and first.dtype is second.dtype:
            return first.dtype
        if isinstance(second, int | float) and first.dtype.is_floating_point:
            return first.dtype
    return torch.result_type(first, second)


def _cast(operand: Tensor | Number, common: torch.dtype) -> int:
    """An operand in the common dtype (aten/src/ATen/TensorIterator.cpp, compute_types: copies on
    the CPU); a number is a tensor first."""
    if isinstance(operand, Tensor):
        return 0 if operand.dtype is common else _copy(operand, common)
    own = NUMBERS[type(operand)]
    return own.itemsize + (0 if own is common else common.itemsize)


def _binary(first: Tensor | Number, second: Tensor | Number, *_: Any, **__: Any) -> int:
    """Arithmetic or a comparison with a new result: both operands in their common dtype."""
    common = _common(first, second)
    return _cast(first, common) + _cast(second, common)


def _binary_in_place(changed: Tensor, second: Tensor | Number, *_: Any, **__: Any) -> int:
    """The same in place: where the common dtype is another, so is at first the result
    (compute_types, cast_common_dtype_to_outputs)."""
    common = _common(changed, second)
    return 2 * _cast(changed, common) + _cast(second, common)


def _foreach_in_place(changed: Sequence[Tensor], number: Number) -> int:
    """One tensor after the other (ForeachOpsKernels.cpp, FOREACH_BINARY_OP_SCALAR)."""
    return max((_binary_in_place(tensor, number) for tensor in changed), default=0)


def _where(_: Tensor, first: Tensor, second: Tensor) -> int:
    """Both sides in their common dtype (TensorCompare.cpp, where_self_out)."""
    return _binary(first, second)


def _isinf(tensor: Tensor) -> int:
    """`abs() == infinity` (TensorCompare.cpp, isinf)."""
    return _copy(tensor) + _binary(tensor, float("inf"))


def _sum(tensor: Tensor, dims: Sequence[int] | None, _keepdim: bool = False, *, dtype: torch.dtype | None = None) -> int:
    """The input in the result's dtype (ReduceOpsUtils.h, make_reduction); where half precision
    would be reduced over two dimensions that are not one in memory, both input and result in fp32
    (ReduceOps.cpp, sum_out and should_use_acc_buffer).
    """
    if dtype is None and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        dtype = torch.int64
    if dtype is not None and dtype is not tensor.dtype:
        return _copy(tensor, dtype)
    if tensor.dtype not in HALF or _reduced_runs(tensor, dims) < 2:
        return 0
    return FLOAT_BYTES * (tensor.numel() + _reduced_numel(tensor, dims))


def _mean(tensor: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> int:
    """The sum, then a division by a number; for half precision in fp32 (ReduceOps.cpp,
    mean_out)."""
    half = (dtype or tensor.dtype) in HALF
    exact = torch.float32 if half else dtype or tensor.dtype
    result = FLOAT_BYTES * _reduced_numel(tensor, dims) if half else 0
    return result + max(_sum(tensor, dims, keepdim, dtype=exact), _cast(1, exact))


def _reduced_dims(tensor: Tensor, dims: Sequence[int] | None) -> set[int]:
    """The dimensions that a reduction takes away; all of them when none is named."""
    return {dim % tensor.dim() for dim in dims or range(tensor.dim())} if tensor.dim() else set()


def _reduced_numel(tensor: Tensor, dims: Sequence[int] | None) -> int:
    """Elements of the result of a reduction."""
    gone = _reduced_dims(tensor, dims)
    return prod(size for dim, size in enumerate(tensor.shape) if dim not in gone)


def _reduced_runs(tensor: Tensor, dims: Sequence[int] | None) -> int:
    """How many dimensions are reduced once those that are one in memory are (TensorIterator.cpp,
    coalesce_dimensions)."""
    shape, strides = tensor.shape, tensor.stride()
    gone = sorted((dim for dim in _reduced_dims(tensor, dims) if shape[dim] > 1), key=lambda dim: (strides[dim], -dim))
    return min(1, len(gone)) + sum(strides[outer] != shape[inner] * strides[inner] for inner, outer in pairwise(gone))


def _layer_norm_backward(gradient: Tensor, tensor: Tensor, shape: Sequence[int], *others: Any) -> int:
    """Each thread's sums for the gradients of weight and bias (cpu/layer_norm_kernel.cpp,
    LayerNormBackwardKernelImplInternal), and the input and its gradient where they are not
    contiguous (layer_norm.cpp, layer_norm_backward_cpu).
    """
    wanted = any(others[-1][1:])
    sums = 2 * torch.get_num_threads() * prod(shape) * tensor.dtype.itemsize if wanted else 0
    return sums + _contiguous(tensor) + _contiguous(gradient)


def _embedding(_: Tensor, indices: Tensor, *__: Any) -> int:
    """The indices in a row (Embedding.cpp, embedding_symint)."""
    return _contiguous(indices)


def _embedding_backward(gradient: Tensor, indices: Tensor, *_: Any) -> int:
    """The indices and the gradient in a row (Embedding.cpp, embedding_dense_backward_cpu)."""
    return _contiguous(indices) + _contiguous(gradient)


def _attention_block(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Rows and columns of the attention matrix at a time (cpu/FlashAttentionKernel.cpp,
    flash_attention_kernel_impl)."""
    rows, columns = query.shape[2], key.shape[2]
    return min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32), min(columns, KEY_BLOCK)


def _attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Each thread's block of the attention matrix, of the result, and its maxima and sums
    (FlashAttentionKernel.cpp, cpu_flash_attention).

    Where keys are packed (heads of a multiple of 64 on CPUs with AMX) the block may be wider, which
    is left out.
    """
    rows, columns = _attention_block(query, key)
    reduced = rows * columns * query.dtype.itemsize if query.dtype in HALF else 0
    return torch.get_num_threads() * (FLOAT_BYTES * rows * (columns + 2 + query.shape[3]) + reduced)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Each thread's block of the attention matrix and of its gradient, and its row sums
    (FlashAttentionKernel.cpp, cpu_flash_attention_backward), and the gradient if its heads are not
    next to each other (flash_attention_backward_kernel_impl).

    In half precision each thread also runs products by oneDNN; what they allocate is left out,
    since its sum depends on timing.
    """
    rows, columns = _attention_block(query, key)
    width = FLOAT_BYTES + (query.dtype.itemsize if query.dtype in HALF else 0)
    threads = torch.get_num_threads() * (2 * rows * columns * width + FLOAT_BYTES * rows)
    return threads + _contiguous(gradient.transpose(1, 2))


def _matrix_product(first: Tensor, second: Tensor) -> int:
    """`mm`, see `_blas_layout` and `asked`."""
    return _product(_ATEN.mm.default, _blas_layout, first, second)


def _biased_matrix_product(bias: Tensor, first: Tensor, second: Tensor, *, beta: Number = 1, **_: Any) -> int:
    """`addmm`, see `_blas_layout` and `asked`; without an inner dimension it is the bias times
    `beta` (addmm_impl_cpu_)."""
    if first.numel() == 0:
        return _cast(beta, bias.dtype) if beta else 0
    return _product(_ATEN.addmm.default, _blas_layout, first, second, bias)


def _batched_matrix_product(first: Tensor, second: Tensor) -> int:
    """`bmm`, see `_onednn_layout` and `asked`; MKL, in fp32, takes the operands as they are."""
    return _product(_ATEN.bmm.default, _onednn_layout, first, second) if _uses_onednn(first, second) else 0


def _product(operator: Any, fits: Callable[[Tensor], bool], first: Tensor, second: Tensor, *added: Tensor) -> int:
    """Copies of operands that do not lie as the library wants them, and what the library takes
    itself."""
    odd = [not fits(first), not fits(second)]
    copies = odd[0] * _copy(first) + odd[1] * _copy(second)
    work = _copy(first) + _copy(second) + first.shape[:-1].numel() * second.shape[-1] * first.dtype.itemsize
    threads = torch.get_num_threads()
    if first.dtype not in HALF or work > ASKED_BYTES * threads:
        return copies
    layouts = [*map(_layout, added), _layout(first, dense=odd[0]), _layout(second, dense=odd[1])]
    return copies + asked(operator, threads, *layouts)


def _blas_layout(matrix: Tensor) -> bool:
    """Whether a matrix needs no copy: its rows or its columns are dense (LinearAlgebra.cpp,
    addmm_impl_cpu_)."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return bool((across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows)))


def _onednn_layout(batch: Tensor) -> bool:
    """Whether a batch of matrices needs no copy: it is dense, as it is or transposed
    (mkldnn/Matmul.cpp, mkldnn_matmul)."""
    _, rows, columns = batch.shape
    return batch.is_contiguous() or batch.stride() == (rows * columns, 1, rows)


def _uses_onednn(first: Tensor, second: Tensor) -> bool:
    """Whether a batched product is oneDNN's (mkldnn/Matmul.cpp, use_mkldnn_matmul and
    checksize)."""
    return first.dtype in HALF and first.numel() * second.shape[2] > 16**3 and _onednn_multiplies(first.dtype)


@cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU can, in half precision (mkldnn/Utils.h, mkldnn_bf16_device_check and
    mkldnn_fp16_device_check)."""
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    return bool(torch._C._get_mkldnn_enabled() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


def _layout(tensor: Tensor, *, dense: bool = False) -> Layout:
    """How a tensor, or a dense copy of it, lies in memory."""
    shape = tuple(tensor.shape)
    return (tensor.dtype, shape, tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1]) if dense else layout(tensor)


@cache
def asked(operator: Any, _threads: int, *layouts: Layout) -> int:
    """Bytes that an operator allocates beside its result when it really runs on tensors of these
    layouts, by PyTorch's own account."""
    with _disable_current_modes():
        operands = [torch.empty_strided(shape, strides, dtype=dtype) for dtype, shape, strides in layouts]
        peak, result = peak_bytes(lambda: operator(*operands))
        return max(0, peak - int(result.untyped_storage().nbytes()))


def _reduce_scatter(_: Tensor, source: Tensor, *__: Any) -> int:
    """Gloo works on a clone of the input (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp,
    _reduce_scatter_base)."""
    return source.untyped_storage().nbytes()


def _reduce_scatter_coalesced(_: Sequence[Tensor], sources: Sequence[Tensor], *__: Any) -> int:
    """The same of several, without what lies beside them in their storages
    (reduce_scatter_tensor_coalesced)."""
    return sum(map(_copy, sources))


def _all_gather(output: Tensor, *_: Any) -> int:
    """Gloo receives into a flat tensor of its own (ProcessGroupGloo.cpp, AsyncAllgatherWork)."""
    return output.untyped_storage().nbytes()


def _all_gather_coalesced(outputs: Sequence[Tensor], sources: Sequence[Tensor], *_: Any) -> int:
    """The same of several, which are flattened before they are sent (ProcessGroupGloo.cpp,
    AsyncAllgatherCoalescedWork)."""
    return sum(map(_copy, outputs)) + (sum(map(_copy, sources)) if len(sources) > 1 else 0)


_ARITHMETIC = ("add", "sub", "mul", "div")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")

CPU_SCRATCH: dict[Any, Callable[..., int]] = {
    **{getattr(getattr(_ATEN, name), kind): _binary for name in (*_ARITHMETIC, *_COMPARISONS) for kind in ("Tensor", "Scalar")},
    **{getattr(getattr(_ATEN, f"{name}_"), kind): _binary_in_place for name in _ARITHMETIC for kind in ("Tensor", "Scalar")},
    **{getattr(_ATEN, f"_foreach_{name}_").Scalar: _foreach_in_place for name in _ARITHMETIC},
    _ATEN.pow.Scalar: _binary,
    _ATEN.where.self: _where,
    _ATEN.isinf.default: _isinf,
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.mean.dim: _mean,
    _ATEN.native_layer_norm_backward.default: _layer_norm_backward,
    _ATEN.embedding.default: _embedding,
    _ATEN.embedding_dense_backward.default: _embedding_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    _ATEN.mm.default: _matrix_product,
    _ATEN.addmm.default: _biased_matrix_product,
    _ATEN.bmm.default: _batched_matrix_product,
    _C10D._reduce_scatter_base_.default: _reduce_scatter,
    _C10D._allgather_base_.default: _all_gather,
    _C10D.reduce_scatter_tensor_coalesced_.default: _reduce_scatter_coalesced,
    _C10D.allgather_into_tensor_coalesced_.default: _all_gather_coalesced,
}
"""By operator, the bytes that its kernel holds beside its outputs while it runs, as a function of
its arguments."""
