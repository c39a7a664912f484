"""The MLPs of a model of transformers computed in tiles of the sequence, by DeepSpeed's own TiledMLP (ALST)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bf16prof.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


def with_tiled_mlp(model: nn.Module) -> nn.Module:
    """The model, each of whose MLPs has only one tile of its tokens at a time; backward computes each tile again.

    A tile has as many tokens as the hidden size is wide, as in ArcticTraining. Raises `InputError` where there is no MLP.
    """
    found = [module for name, module in model.named_modules() if name.endswith("mlp") and type(module).__name__.endswith("MLP")]
    if not found:
        raise InputError(f"workload.tiled_mlp: {type(model).__name__} has no dense MLP that transformers calls so")
    for module in found:
        _tile(module)
    return model


def _tile(module: Any) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    whole = module.forward

    def forward(x: Tensor) -> Any:
        tokens, hidden = x.shape[-2:]
        return TiledMLP.apply(lambda _, part: whole(part), module, x, math.ceil(tokens / hidden), list(module.parameters()))

    module.forward = forward
