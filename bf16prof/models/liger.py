"""Liger's kernels on a model of transformers, put there by Liger-Kernel itself, as the Trainer's
`use_liger_kernel` does."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from bf16prof.errors import InputError
from bf16prof.models.foreign import library, one_line
from bf16prof.profiles.schema import Liger

if TYPE_CHECKING:
    from torch import nn

LOSS = "fused_linear_cross_entropy"


def import_liger(wanted: Liger) -> None:
    """Import Liger-Kernel, so that what it allocates for itself is not taken for the job's."""
    if wanted != "none":
        _liger()


def with_liger(model: nn.Module, wanted: Liger) -> nn.Module:
    """The model with Liger's kernels: all that it has for this architecture, or the head with its
    loss alone.

    Raises `InputError` where Liger has none for it; Liger itself would leave the model as it is.
    """
    if wanted == "none":
        return model
    liger = _liger()
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"workload.liger: Liger-Kernel has no kernels for {model_type or type(model).__name__!r:.60}")
    choices = inspect.signature(liger.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]).parameters
    if LOSS not in choices and wanted == "loss":
        raise InputError(f"workload.liger: Liger-Kernel has no fused loss for {model_type!r:.60}")
    only = {name: name == LOSS for name in choices if name != "model"} if wanted == "loss" else {}
    with one_line(f"workload.liger: Liger-Kernel cannot be put on {type(model).__name__}"):
        liger._apply_liger_kernel_to_instance(model=model, **only)
    return model


def _liger() -> Any:
    return library("liger_kernel.transformers.monkey_patch", "workload.liger needs liger-kernel", "liger")
