"""CUDA's autocast list on the simulated GPU.

The simulated GPU is a CPU to PyTorch, whose autocast list is shorter than CUDA's: layer norms,
softmax and losses stay in bf16 there and run in fp32 on a GPU. The operators that differ are
registered anew for the autocast key of the CPU, with CUDA's policy (aten/src/ATen/autocast_mode.h:
AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bf16prof.dry_run.hardware.cuda_operators.registration import overload

FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "group_norm", "rms_norm",
    "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss",
    "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss",
    "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist",
    "pdist", "cdist", "renorm", "logsumexp",
)  # fmt: skip
"""Operators whose floating-point inputs are cast to fp32."""

FP32_BY_DTYPE = (
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "sum",
    "sum.dim_IntList",
)
"""Operators that are asked for an fp32 result when the caller names no dtype."""

AUTOCAST_KEY = "AutocastCPU"
_EXCLUDED = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def register_cuda_list() -> torch.library.Library:
    """Register CUDA's policy; it holds until the library that is returned is destroyed."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in FP32:
        library.impl(name, _cast_inputs(overload(name)), AUTOCAST_KEY, allow_override=True)  # type: ignore[no-untyped-call]
    for name in FP32_BY_DTYPE:
        library.impl(name, _ask_for_fp32(overload(name)), AUTOCAST_KEY, allow_override=True)  # type: ignore[no-untyped-call]
    return library


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _cast_inputs(operator: Any) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        return value.float() if _eligible(value) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
            return operator(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run


def _ask_for_fp32(operator: Any) -> Callable[..., Any]:
    position = next(i for i, a in enumerate(operator._schema.arguments) if a.name == "dtype")
    keyword_only = operator._schema.arguments[position].kwarg_only

    def run(*args: Any, **kwargs: Any) -> Any:
        named = kwargs.get("dtype") is not None or (not keyword_only and len(args) > position and args[position] is not None)
        if not named and _eligible(args[0]):
            kwargs["dtype"] = torch.float32
            args = args[:position] if not keyword_only else args
        with torch._C._ExcludeDispatchKeyGuard(_EXCLUDED):
            return operator(*args, **kwargs)

    return run
