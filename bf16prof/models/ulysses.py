"""A model of transformers whose attention is shared by the ranks of a sequence, put there by DeepSpeed itself (Ulysses, ALST)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bf16prof.errors import InputError
from bf16prof.models.adapted import unwrapped
from bf16prof.models.foreign import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "parallel.sequence"


def share_attention(model: nn.Module, ranks: int, micro_batch_size: int) -> Any:
    """Let attention exchange tokens for heads with the other ranks of a sequence; the groups of ranks, which DeepSpeed calls `mpu`.

    As accelerate does (accelerator.py, _prepare_deepspeed). It replaces the function that transformers calls, for this process.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    with one_line(f"{NAME}: DeepSpeed's Ulysses refuses this model"):
        config = getattr(unwrapped(model), "config", None)
        if config is None:
            raise InputError(f"{NAME}: DeepSpeed's Ulysses works on models of transformers, {type(model).__name__} is none")
        return UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=config._attn_implementation,
            sequence_parallel_size=ranks,
            micro_batch_size=micro_batch_size,
            seq_length_is_variable=True,
        )


def shared_loss(loss: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a sequence over the ranks that share it, each by its tokens, as transformers computes it.

    integrations/deepspeed.py, deepspeed_sp_compute_loss.
    """
    import torch
    from deepspeed.utils import groups
    from torch.distributed.nn import functional

    all_gather: Any = functional.all_gather
    group = groups._get_sequence_parallel_group()
    losses = torch.stack(list(all_gather(loss, group=group)))
    counts = torch.stack(list(all_gather((labels != IGNORED).view(-1).sum(), group=group)))
    safe = torch.where(counts > 0, losses, torch.zeros_like(losses))
    return (safe * counts).sum() / counts.sum().clamp(min=1)


IGNORED = -100
"""The label of a token that no loss is computed of."""
