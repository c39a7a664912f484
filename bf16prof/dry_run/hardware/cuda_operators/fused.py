"""Operators that CUDA runs as one kernel where a CPU runs several, or another that keeps other
tensors.

Each returns `NotImplemented` where CUDA takes the same path as a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bf16prof.dry_run.hardware.cuda_operators.attention import HALF

LAYER_NORM_EPSILON = 1e-5

_ATEN = torch.ops.aten


def dropout(input: Tensor, p: float, train: bool) -> Any:
    """`native_dropout`, which keeps a mask of one byte per element; a CPU keeps the noise in the
    input's type."""
    if not train or not 0 < p < 1 or input.numel() == 0:
        return NotImplemented
    return _ATEN.native_dropout(input, p, train)[0]


def softmax(operator: Any) -> Callable[..., Any]:
    """`softmax` or `log_softmax` of fp16 into fp32, without the fp32 copy of the input that a CPU
    makes. Not so for bf16."""

    def run(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        if input.dtype is not torch.float16 or dtype is not torch.float32:
            return NotImplemented
        return operator(input, dim, True)

    return run


def layer_norm(input: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any) -> Any:
    """`native_layer_norm`, which keeps the mean and the reciprocal deviation of half-precision rows
    in fp32."""
    if input.dtype not in HALF:
        return NotImplemented
    return _LayerNorm.apply(input, shape, rest[0] if rest else LAYER_NORM_EPSILON, weight, bias)  # type: ignore[no-untyped-call]


def rms_norm(input: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Any:
    """`_fused_rms_norm`, which keeps its input and the rows' reciprocal root mean squares; a CPU
    keeps every step in fp32."""
    if weight is not None and weight.dtype is not input.dtype:
        return NotImplemented
    return _RmsNorm.apply(input, shape, weight, eps)  # type: ignore[no-untyped-call]


class _LayerNorm(torch.autograd.Function):
    """The formula of `native_layer_norm` in derivatives.yaml. For a CPU, fake tensors give the
    statistics the input's type."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: list[int], eps: float, *affine: Tensor | None) -> Tensor:
        out: Tensor
        out, mean, rstd = _ATEN.native_layer_norm(input, shape, *affine, eps)
        ctx.save_for_backward(input, *affine, mean.float(), rstd.float())
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        mask = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        grads = _ATEN.native_layer_norm_backward(grad, input, ctx.shape, mean, rstd, weight, bias, mask)
        return grads[0], None, None, grads[1], grads[2]


class _RmsNorm(torch.autograd.Function):
    """The formula of `_fused_rms_norm` in derivatives.yaml, which a CPU, without that kernel, does
    not reach."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
        out: Tensor
        with torch._C._AutoDispatchBelowAutograd():
            out, rstd = _ATEN._fused_rms_norm(input, shape, weight, eps)
        ctx.save_for_backward(input, weight, rstd)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, rstd = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        grads = _ATEN._fused_rms_norm_backward(grad, input, ctx.shape, rstd, weight, mask)
        return grads[0], None, grads[1], None


FUSED: dict[str, Callable[..., Any]] = {
    "dropout": dropout,
    "softmax.int": softmax(_ATEN._softmax),
    "log_softmax.int": softmax(_ATEN._log_softmax),
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
