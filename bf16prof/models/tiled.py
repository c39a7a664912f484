"""Parts of a model of transformers computed in tiles of the sequence, by DeepSpeed's own code
(ALST): its MLPs, and its head with the loss."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, cast

from bf16prof.errors import InputError
from bf16prof.models.ulysses import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn


def with_tiled_mlp(model: nn.Module) -> nn.Module:
    """The model, each of whose MLPs has only one tile of its tokens at a time; backward computes
    each tile again.

    A tile has as many tokens as the hidden size is wide, as in ArcticTraining. Raises `InputError`
    where there is no MLP.
    """
    found = [module for name, module in model.named_modules() if name.endswith("mlp") and type(module).__name__.endswith("MLP")]
    if not found:
        raise InputError(f"workload.tiled_mlp: {type(model).__name__} has no dense MLP that transformers calls so")
    for module in found:
        _tile(module)
    return model


LOGITS_BYTES = 2**30
"""A tile of the loss has logits of so many bytes in fp32, as in ArcticTraining
(trainer/sft_trainer.py)."""


def with_tiled_loss(model: nn.Module, tiles: int | None) -> nn.Module:
    """The model, whose head and loss see one tile of the tokens at a time and compute its gradients
    at once: DeepSpeed's TiledFusedLogitsLoss. Raises `InputError` where the head is not to be
    found.
    """
    any_model: Any = model
    head = any_model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(any_model, "base_model", None)
    if head is None or backbone in (None, model) or not hasattr(any_model, "loss_function"):
        raise InputError(f"workload.fused_loss: {type(model).__name__} has no head of its own and a loss over its logits")
    usual = any_model.forward

    @functools.wraps(usual)
    def forward(input_ids: Tensor, *, labels: Tensor | None = None, **more: Any) -> Any:
        if labels is None or not model.training:
            return usual(input_ids, labels=labels, **more)
        from transformers.modeling_outputs import CausalLMOutput

        hidden = backbone(input_ids, **more).last_hidden_state
        return CausalLMOutput(loss=_tiled_loss(any_model, head, hidden, labels, tiles))

    any_model.forward = forward
    return model


def _tiled_loss(model: Any, head: Any, hidden: Tensor, labels: Tensor, tiles: int | None) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
    from torch.nn import functional

    vocabulary = model.config.get_text_config().vocab_size

    targets = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
    count = (targets != IGNORED).sum()

    def loss_of(model: Any, part: Tensor, targets: Tensor) -> Any:
        """The part of the mean: what is divided later would not reach the head's gradients, which
        are made here."""
        logits = head(part)
        mean = model.loss_function(logits=logits, labels=None, vocab_size=vocabulary, shift_labels=targets)
        return mean * ((targets != IGNORED).sum() / count)

    tiles = tiles or math.ceil(labels.numel() * vocabulary * 4 / LOGITS_BYTES)
    loss: Any = TiledFusedLogitsLoss.apply(loss_of, model, hidden, targets, None, tiles, list(head.parameters()), "sum")
    return cast("Tensor", loss)


def _tile(module: Any) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    whole = module.forward

    def forward(x: Tensor) -> Any:
        tokens, hidden = x.shape[-2:]
        return TiledMLP.apply(lambda _, part: whole(part), module, x, math.ceil(tokens / hidden), list(module.parameters()))

    module.forward = forward
