"""The optimizers of PyTorch as they are on a GPU: they work on lists of parameters unless told
otherwise, with a temporary list."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from bf16prof.dry_run.tracker import GPU

_CHOICE = "_default_to_fused_or_foreach"


@contextlib.contextmanager
def cuda_optimizers() -> Iterator[None]:
    """Let `torch.optim` choose for parameters on the simulated GPU as for native CUDA tensors; put
    back at the end."""
    modules = [module for name, module in sys.modules.items() if name.startswith("torch.optim.") and hasattr(module, _CHOICE)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, _CHOICE, _choose))
        yield


def _choose(params: Sequence[Tensor | None], differentiable: bool, use_fused: bool = False) -> tuple[bool, bool]:
    """torch/optim/optimizer.py: `(fused, foreach)`; the real one knows neither fake tensors nor
    lists of parameters on a CPU."""
    if differentiable or any(p is not None and p.device != GPU for p in params):
        return _default_to_fused_or_foreach(list(params), differentiable, use_fused)  # type: ignore[arg-type]
    fused = use_fused and all(p is None or torch.is_floating_point(p) for p in params)
    return fused, not fused
