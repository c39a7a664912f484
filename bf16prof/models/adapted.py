"""A model with an adapter, put there by PEFT itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bf16prof.models.foreign import library, one_line
from bf16prof.profiles.adapters import AdapterSettings

if TYPE_CHECKING:
    from torch import nn


def import_peft(settings: AdapterSettings | None) -> None:
    """Import what an adapter needs, so that what it allocates for itself is not taken for the
    job's."""
    if settings is not None:
        _peft()


def adapted(model: nn.Module, settings: AdapterSettings) -> nn.Module:
    """The model with the adapter: its own parameters are frozen. Raises `InputError` where PEFT
    says no."""
    peft = _peft()
    with one_line(f"[peft] PEFT cannot put this {settings.method} on {type(model).__name__}"):
        wrapped: Any = peft.get_peft_model(
            model, peft.LoraConfig(**settings.for_peft()), autocast_adapter_dtype=settings.autocast_adapter_dtype
        )
        if settings.enable_input_require_grads:
            wrapped.enable_input_require_grads()
    trained: nn.Module = wrapped.train()
    return trained


def unwrapped(model: Any) -> Any:
    """The model inside PEFT's wrapper, whose forward passes on what it is given; any other as it
    is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _peft() -> Any:
    return library("peft", "an adapter needs peft", "peft")
