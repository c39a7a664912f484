"""Scaled dot product attention on the simulated GPU: the backend that CUDA would choose, and what
it keeps.

`scaled_dot_product_attention` is one operator per backend below; each has its own backward, saved
tensors and scratch. The conditions are those of
`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (and `sdp_utils_cpp.h`), the padding is that
of `aten/src/ATen/native/transformers/attention.cpp`, for PyTorch 2.13 and its default wheel (CUDA
13.0, cuDNN 9.20).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bf16prof.profiles.gpus import FIRST_WITH_BF16, has_small_shared_memory

OLDEST_EFFICIENT, NEWEST = (5, 0), (12, 1)
"""The compute capabilities for which PyTorch has memory-efficient attention
(`check_mem_efficient_hardware_support`)."""

HALF = (torch.float16, torch.bfloat16)

FLASH_ALIGNMENT = 8
"""`pad_last_dim<8>`: flash attention takes head dimensions that are multiples of it."""

MASK_ALIGNMENT = 8
"""`mem_eff_alignment` of `preprocess_mask`: rows of an additive mask start at multiples of it."""

_DEFAULTS: tuple[Any, ...] = (None, 0.0, False)
_LARGEST_CUDNN_SIZE = 65535
_ATEN = torch.ops.aten


class Backend(enum.Enum):
    """`sdp::SDPBackend`, as far as CUDA has it."""

    CUDNN = "cuDNN"
    FLASH = "flash"
    EFFICIENT = "memory-efficient"
    MATH = "math"


@dataclass(frozen=True)
class Call:
    """`sdp::sdp_params`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    grouped: bool

    @property
    def trains(self) -> bool:
        """`input_requires_grad`, which is also `should_compute_logsumexp`."""
        return torch.is_grad_enabled() and any(each.requires_grad for each in self)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.query, self.key, self.value))


def attention(capability: tuple[int, int]) -> Callable[..., Any]:
    """`scaled_dot_product_attention` for a GPU of that compute capability."""

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float | None = None, enable_gqa: bool = False) -> Any:
        mask, dropout, causal = (*rest, *_DEFAULTS[len(rest) :])
        call = Call(query, key, value, mask, dropout, causal, enable_gqa)
        if len({(each.dtype, each.device) for each in call}) > 1:
            return NotImplemented  # an error, which the operator words itself
        return _RUN[choose(call, capability)](call, scale)

    return run


def choose(call: Call, capability: tuple[int, int]) -> Backend:
    """`_fused_sdp_choice_cuda`: the first backend, in CUDA's order of preference, that is enabled
    and takes the call."""
    for backend in _order(capability):
        if _ENABLED[backend]() and _TAKES[backend](call, capability):
            return backend
    raise RuntimeError("No available kernel. Aborting execution.")


def _order(capability: tuple[int, int]) -> tuple[Backend, ...]:
    """cuDNN comes first on compute capability 9.x and 10.x (`check_prefer_cudnn_attention`),
    elsewhere after the math backend."""
    fused = (Backend.FLASH, Backend.EFFICIENT, Backend.MATH)
    return (Backend.CUDNN, *fused) if capability[0] in (9, 10) else (*fused, Backend.CUDNN)


def _takes_cudnn(call: Call, capability: tuple[int, int]) -> bool:
    return (
        _supported(capability)
        and _shapes_fit(call)
        and call.query.dtype in HALF
        and _mask_fits_cudnn(call)
        and (call.dropout * 16).is_integer()
        and not (torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled())
        and _last_dimension_is_dense(call, ignore_one=True)
        and _heads_fit(call, grouped=call.grouped, same_key_value=False)
        and _sizes_fit_cudnn(call, capability)
    )


def _sizes_fit_cudnn(call: Call, capability: tuple[int, int]) -> bool:
    """`check_cudnn_tensor_shapes`: above a head dimension of 128, only on Hopper, or as DeepSeek's
    192 and 128 on Blackwell."""
    batch, heads, queries, dim = call.query.shape
    keys, value_dim = call.key.shape[2], call.value.shape[3]
    largest = 256 if capability == (9, 0) else 192 if capability[0] == 10 and (dim, value_dim) == (192, 128) else 128
    return (
        max(batch, heads) <= _LARGEST_CUDNN_SIZE
        and max(dim, value_dim) <= largest
        and dim % 8 == 0
        and value_dim % 8 == 0
        and keys != 1
        and not (queries == 1 and call.dropout)
    )


def _mask_fits_cudnn(call: Call) -> bool:
    """`check_attn_mask_shape`: no gradient, two or four dimensions, each as large as the attention
    matrix's, or 1."""
    mask = call.mask
    if mask is None:
        return True
    if mask.requires_grad or mask.dim() not in {2, 4}:
        return False
    matrix = (*call.query.shape[:3], call.key.shape[2])[-mask.dim() :]
    return all(size in {1, full} for size, full in zip(mask.shape, matrix, strict=True))


def _takes_flash(call: Call, capability: tuple[int, int]) -> bool:
    dims = {each.shape[-1] for each in call}
    return (
        _supported(capability)
        and _shapes_fit(call)
        and call.mask is None
        and len(dims) == 1
        and max(dims) <= 256
        and not _too_wide_to_train(call, capability)
        and not (call.causal and call.query.shape[2] != call.key.shape[2])
        and call.query.dtype in HALF
        and _heads_fit(call, grouped=call.grouped)
        and _last_dimension_is_dense(call, ignore_one=True)
    )


def _too_wide_to_train(call: Call, capability: tuple[int, int]) -> bool:
    """`check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120`: the shared memory of
    these GPUs is too small."""
    dim = call.query.shape[-1]
    return has_small_shared_memory(capability) and call.trains and dim > 192 and (dim <= 224 or call.dropout > 0)


def _takes_efficient(call: Call, capability: tuple[int, int]) -> bool:
    """Never groups heads in 2.13: the backward's shapes are those of the query's heads. Below
    compute capability 8.0 it takes no bf16, and fp32 of any width (`minimum_gemm_alignment`)."""
    is_old = capability < FIRST_WITH_BF16
    alignment = 8 if call.query.dtype in HALF else 1 if is_old else 4
    dims = [each.shape[-1] for each in call]
    return (
        OLDEST_EFFICIENT <= capability <= NEWEST
        and _shapes_fit(call)
        and dims[0] == dims[1]
        and all(dim > 0 and dim % alignment == 0 for dim in dims)
        and _last_dimension_is_dense(call, ignore_one=False)
        and _heads_fit(call, grouped=False)
        and call.query.dtype in ((torch.float16, torch.float32) if is_old else (*HALF, torch.float32))
    )


def _supported(capability: tuple[int, int]) -> bool:
    """Whether flash and cuDNN attention run on it (`check_flash_attention_hardware_support`,
    `check_cudnn_hardware_support`)."""
    return FIRST_WITH_BF16 <= capability <= NEWEST


def _shapes_fit(call: Call) -> bool:
    """`check_tensor_shapes`, `check_nonzero_sequence_lengths_dense`, and the batch of
    `check_batch_size_and_num_heads_dense`."""
    if any(each.dim() != 4 for each in call):
        return False
    return len({each.shape[0] for each in call}) == 1 and call.query.shape[2] > 0 and call.key.shape[2] > 0


def _heads_fit(call: Call, *, grouped: bool, same_key_value: bool = True) -> bool:
    """The heads of `check_batch_size_and_num_heads_dense`, and `check_grouped_query_attention`."""
    query, key, value = (each.shape[1] for each in call)
    if grouped:
        return (key == value or not same_key_value) and query % key == 0 and query % value == 0
    return query == key == value


def _last_dimension_is_dense(call: Call, *, ignore_one: bool) -> bool:
    """`check_last_dim_stride_equals_1_dense`."""
    dense = all(each.stride(-1) == 1 for each in call) or (ignore_one and call.query.shape[-1] == 1)
    return dense and (call.mask is None or call.mask.stride(-1) == 1)


def _run_cudnn(call: Call, scale: float | None) -> Tensor:
    out = _ATEN._scaled_dot_product_cudnn_attention(*call, _additive(call), call.trains, call.dropout, call.causal, False, scale=scale)
    return _first(out)


def _run_flash(call: Call, scale: float | None) -> Tensor:
    dim = call.query.shape[-1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    padded = [_pad(each, -dim % FLASH_ALIGNMENT) for each in call]
    out = _first(_ATEN._scaled_dot_product_flash_attention(*padded, call.dropout, call.causal, False, scale=scale))
    return out if dim == out.shape[-1] else out[..., :dim]


def _run_efficient(call: Call, scale: float | None) -> Tensor:
    mask = _additive(call)
    if mask is not None:
        mask = _aligned(mask).expand(*call.query.shape[:3], call.key.shape[2])
    out = _ATEN._scaled_dot_product_efficient_attention(*call, mask, call.trains, call.dropout, call.causal, scale=scale)
    return _first(out)


def _run_math(call: Call, scale: float | None) -> Tensor:
    mask = _additive(call)
    out = _ATEN._scaled_dot_product_attention_math(*call, mask, call.dropout, call.causal, None, scale=scale, enable_gqa=call.grouped)
    return _first(out)


def _additive(call: Call) -> Tensor | None:
    """`convert_boolean_attn_mask`: the mask that is added to the scores, a new tensor where the
    caller's is boolean."""
    mask, dtype = call.mask, call.query.dtype
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.where(mask, mask.new_zeros((), dtype=dtype), mask.new_full((), -math.inf, dtype=dtype))


def _aligned(mask: Tensor) -> Tensor:
    """`preprocess_mask`: a copy with padded rows where the rows of the mask do not start at
    multiples of the alignment."""
    if mask.stride(-1) == 1 and all(stride % MASK_ALIGNMENT == 0 for stride in mask.stride()[:-1]):
        return mask
    size = mask.shape[-1]
    return _pad(mask, MASK_ALIGNMENT - size % MASK_ALIGNMENT)[..., :size]


def _pad(tensor: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, count)) if count else tensor


def _first(outputs: Any) -> Tensor:
    out: Tensor = outputs[0]
    return out


_ENABLED: dict[Backend, Callable[[], bool]] = {
    Backend.CUDNN: torch.backends.cuda.cudnn_sdp_enabled,
    Backend.FLASH: torch.backends.cuda.flash_sdp_enabled,
    Backend.EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled,
    Backend.MATH: torch.backends.cuda.math_sdp_enabled,
}
_TAKES: dict[Backend, Callable[[Call, tuple[int, int]], bool]] = {
    Backend.CUDNN: _takes_cudnn,
    Backend.FLASH: _takes_flash,
    Backend.EFFICIENT: _takes_efficient,
    Backend.MATH: lambda call, capability: True,
}
_RUN: dict[Backend, Callable[[Call, float | None], Tensor]] = {
    Backend.CUDNN: _run_cudnn,
    Backend.FLASH: _run_flash,
    Backend.EFFICIENT: _run_efficient,
    Backend.MATH: _run_math,
}
