"""The torch modules of the model families: token ids [batch, sequence] in, logits [batch, sequence, vocabulary] out.

`build` makes any model of a profile; those that are not ours are made in `models/foreign.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bf16prof.models import foreign
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, Model

if TYPE_CHECKING:
    from torch import Tensor, nn


def build(model: Model, *, activation_checkpointing: bool) -> nn.Module:
    """The model of a profile, freshly initialised in fp32 on the current default device.

    Raises `InputError` when it cannot be built: what it is made from is the user's own.
    """
    if isinstance(model, HuggingFaceSettings):
        return foreign.from_hf_config(model, activation_checkpointing)
    if isinstance(model, FactorySettings):
        return foreign.from_factory(model, activation_checkpointing)
    family = importlib.import_module(f"{__name__}.{model.family.replace('-', '_')}")
    module: nn.Module = family.Model(model, activation_checkpointing)
    return module


def run_layers(layers: Iterable[nn.Module], x: Tensor, *extra: Tensor, checkpointing: bool) -> Tensor:
    """Run layers one after the other on x [batch, sequence, hidden]; with checkpointing keep only each layer's input."""
    from torch.utils.checkpoint import checkpoint

    for layer in layers:
        x = checkpoint(layer, x, *extra, use_reentrant=False) if checkpointing else layer(x, *extra)
    return x
