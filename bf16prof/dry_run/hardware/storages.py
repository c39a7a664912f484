"""Operators whose output holds a larger storage than its shape says, on every device: they compute
elementwise and reduce in place.

Fake tensors answer with the shape alone. Sources are in PyTorch's `aten/src/ATen/native`. Each
function gives the bytes of the outputs' storages, in their order; 0 where the shape says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NONE = 0
"""`at::Reduction::None`: every element has its own loss."""
MEAN = 1
"""`at::Reduction::Mean`, the default."""

_ATEN = torch.ops.aten


def _promoted(input: Tensor, target: Tensor) -> int:
    shape = torch.broadcast_shapes(input.shape, target.shape)  # type: ignore[no-untyped-call]
    return int(shape.numel() * torch.result_type(input, target).itemsize)


def _pointwise_loss(input: Tensor, target: Tensor, reduction: int = MEAN, *_: Any, **__: Any) -> Sequence[int]:
    """The meta function plans one loss an element, and then resizes the output to a scalar
    (BinaryOps.cpp, TORCH_META_FUNC(mse_loss), TORCH_META_FUNC(smooth_l1_loss)). A tensor that is
    made smaller keeps its storage."""
    return () if reduction == NONE else (_promoted(input, target),)


def _soft_margin_loss(input: Tensor, target: Tensor, reduction: int = MEAN) -> Sequence[int]:
    """`soft_margin_loss_out` fills the output with one loss an element and resizes it
    (Loss.cpp)."""
    return () if reduction == NONE else (int(target.numel() * input.itemsize),)


def _binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN) -> Sequence[int]:
    """`binary_cross_entropy_cpu` and `binary_cross_entropy_cuda` resize their losses to the sum
    (Loss.cpp, cuda/Loss.cu)."""
    return () if reduction == NONE else (int(input.numel() * input.itemsize),)


Storages = Mapping[Any, Callable[..., Sequence[int]]]

STORAGES: Storages = {
    _ATEN.mse_loss.default: _pointwise_loss,
    _ATEN.smooth_l1_loss.default: _pointwise_loss,
    _ATEN.soft_margin_loss.default: _soft_margin_loss,
    _ATEN.binary_cross_entropy.default: _binary_cross_entropy,
}
"""By operator, the bytes of its outputs' storages, on every device."""
