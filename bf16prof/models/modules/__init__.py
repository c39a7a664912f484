"""The torch modules of the model families: token ids [batch, sequence] in, logits [batch, sequence,
vocabulary] out.

`build` makes any model of a profile; those that are not ours are made in `models/foreign.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bf16prof.errors import InputError
from bf16prof.models import foreign
from bf16prof.models.adapted import adapted
from bf16prof.models.foreign import Checkpointing
from bf16prof.models.liger import with_liger
from bf16prof.models.pipelined import pipelined
from bf16prof.models.quantized import quantized
from bf16prof.models.tiled import with_tiled_loss, with_tiled_mlp
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, Model
from bf16prof.profiles.schema import Profile

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def build_trained(profile: Profile, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """What a profile trains: its model, and the adapter on it. Raises `InputError` as `build` does.

    4-bit weights are made on that device, of weights of that dtype, which layers compute in.
    """
    workload = profile.workload
    if profile.parallel.pipeline > 1:
        return pipelined(profile.model, profile.parallel.pipeline)
    how = Checkpointing(workload.use_reentrant, workload.checkpoint_every_n_layers) if workload.activation_checkpointing else None
    settings = foreign.scoring(profile.model) if workload.reward else profile.model
    model = with_liger(build(settings, activation_checkpointing=how), workload.liger)
    model = with_tiled_mlp(model) if workload.tiled_mlp else model
    model = with_tiled_loss(model, workload.fused_loss_tiles) if workload.fused_loss == "tiled" else model
    if profile.quantization is not None:
        assert dtype is not None, "whoever builds a quantized model says what it computes in"
        model = quantized(model, profile.quantization, dtype, device)
    model = model if profile.peft is None else adapted(model, profile.peft)
    return foreign.without_dropout(model) if workload.has_pairs else model  # TRL turns it off last, in the adapter as well


def build(model: Model, *, activation_checkpointing: bool | Checkpointing | None) -> nn.Module:
    """The model of a profile, freshly initialised in fp32 on the current default device.

    Raises `InputError` when it cannot be built: what it is made from is the user's own.
    """
    how = Checkpointing() if activation_checkpointing is True else activation_checkpointing or None
    if isinstance(model, HuggingFaceSettings):
        return foreign.from_hf_config(model, how)
    if isinstance(model, FactorySettings):
        return foreign.from_factory(model, how)
    if how not in (None, Checkpointing()):
        raise InputError("workload.use_reentrant and checkpoint_every_n_layers: models of transformers have the choice")
    family = importlib.import_module(f"{__name__}.{model.family.replace('-', '_')}")
    module: nn.Module = family.build(model, activation_checkpointing=how is not None)
    return module


def run_layers(layers: Iterable[nn.Module], x: Tensor, *extra: Tensor, checkpointing: bool) -> Tensor:
    """Run layers one after the other on x [batch, sequence, hidden]; with checkpointing keep only
    each layer's input."""
    from torch.utils.checkpoint import checkpoint

    for layer in layers:
        x = checkpoint(layer, x, *extra, use_reentrant=False) if checkpointing else layer(x, *extra)
    return x
