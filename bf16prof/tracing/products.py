"""The operations of matrix products as PyTorch's own counter has them
(torch/utils/flop_counter.py)."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from bf16prof.models.autograd.events import RECOMPUTED

_ATEN = torch.ops.aten

ATTENTION = {
    name: times
    for name, times in {
        "_scaled_dot_product_flash_attention": 1,
        "_scaled_dot_product_efficient_attention": 1,
        "_scaled_dot_product_cudnn_attention": 1,
        "_scaled_dot_product_flash_attention_for_cpu": 1,
        "_scaled_dot_product_flash_attention_backward": 2,
        "_scaled_dot_product_efficient_attention_backward": 2,
        "_scaled_dot_product_cudnn_attention_backward": 2,
        "_scaled_dot_product_flash_attention_for_cpu_backward": 2,
    }.items()
    if hasattr(_ATEN, name)
}
"""Fused kernels count as the products that they stand for: two forward and four backward. What a
kernel computes again is its own business, and no part of a model's work (the counter under
`SDPBackend.MATH`)."""

_FUSED = {getattr(_ATEN, name): times for name, times in ATTENTION.items()}
_GROUPED = getattr(_ATEN, "_grouped_mm", None)


def operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """How many a call takes; 0 of everything that is no matrix product."""
    packet = func._overloadpacket
    if (times := _FUSED.get(packet)) is not None:
        query, key, value = [each for each in args if isinstance(each, Tensor)][times - 1 : times + 2]
        return times * int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]
    if packet is _GROUPED:
        return _grouped(args[0], out)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def part() -> str:
    """Which part of a micro-step runs: in backward autograd has gradients off, unless a layer is
    computed again. A function of Python's own has them off then too, and is inside of what
    checkpointing calls."""
    if torch._C._current_graph_task_id() == -1:
        return "forward"
    return RECOMPUTED if torch.is_grad_enabled() or _is_called_by_checkpointing() else "backward"


def _is_called_by_checkpointing() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _grouped(first: Tensor, out: Tensor) -> int:
    """Rows by the matrix of their group, or, for the gradient of the matrices, columns by columns:
    every element of the first meets as many of the second as its row has in the result."""
    return 2 * int(first.numel()) * int(out.shape[-1])
