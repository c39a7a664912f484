"""The torch modules of the model families: token ids [batch, sequence] in, logits [batch, sequence, vocabulary] out."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bf16prof.profiles.schema import ModelSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


def build(model: ModelSettings, *, activation_checkpointing: bool) -> nn.Module:
    """The module of the model's family, freshly initialised in fp32 on the current default device."""
    family = importlib.import_module(f"{__name__}.{model.family.replace('-', '_')}")
    module: nn.Module = family.Model(model, activation_checkpointing)
    return module


def run_layers(layers: Iterable[nn.Module], x: Tensor, *extra: Tensor, checkpointing: bool) -> Tensor:
    """Run layers one after the other on x [batch, sequence, hidden]; with checkpointing keep only each layer's input."""
    from torch.utils.checkpoint import checkpoint

    for layer in layers:
        x = checkpoint(layer, x, *extra, use_reentrant=False) if checkpointing else layer(x, *extra)
    return x
