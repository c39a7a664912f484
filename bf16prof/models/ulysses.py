"""A model of transformers whose attention is shared by the ranks of a sequence, put there by
DeepSpeed itself (Ulysses, ALST)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bf16prof.errors import InputError
from bf16prof.models.adapted import unwrapped
from bf16prof.models.foreign import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "parallel.sequence"


def share_attention(model: nn.Module, ranks: int, micro_batch_size: int) -> Any:
    """Let attention exchange tokens for heads with the other ranks of a sequence; the groups of
    ranks, which DeepSpeed calls `mpu`.

    As accelerate does (accelerator.py, _prepare_deepspeed). It replaces the function that
    transformers calls, for this process.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    with one_line(f"{NAME}: DeepSpeed's Ulysses refuses this model"):
        config = getattr(unwrapped(model), "config", None)
        if config is None:
            raise InputError(f"{NAME}: DeepSpeed's Ulysses works on models of transformers, {type(model).__name__} is none")
        _require_heads(config.get_text_config())
        return UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model,
            core_attn_implementation=config._attn_implementation,
            sequence_parallel_size=ranks,
            micro_batch_size=micro_batch_size,
            seq_length_is_variable=True,
        )


def _require_heads(config: Any) -> None:
    """Raise `InputError` for a configuration that does not say what DeepSpeed reads of it
    (ulysses_sp.py, register_with_transformers)."""
    for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim"):
        default = None if key != "head_dim" else 0  # which may be absent, but not null
        if getattr(config, key, default) is None:
            raise InputError(
                f"{NAME}: DeepSpeed's Ulysses reads {key}, which the configuration of {config.model_type!r} does not have",
                hint=f"--set model.hf_config.{key}=N, if the model knows it",
            )


def shared_loss(loss: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a sequence over the ranks that share it, each by its tokens: the value and
    the gradient that transformers computes (integrations/deepspeed.py, deepspeed_sp_compute_loss).

    It gathers the losses; here they are summed. The gradient of PyTorch's gather knows the ranks of
    a group by their numbers in the job on gloo, and fails in all groups but the first
    (torch/distributed/nn/functional.py, _AlltoAll).
    """
    import torch
    from deepspeed.utils import groups
    from torch.distributed.nn import functional

    all_reduce: Any = functional.all_reduce
    group = groups._get_sequence_parallel_group()
    count = (labels != IGNORED).sum()
    own = torch.where(count > 0, loss, torch.zeros_like(loss)) * count
    total: Tensor = all_reduce(own, group=group) / all_reduce(count, group=group).clamp(min=1)
    return total


IGNORED = -100
"""The label of a token that no loss is computed of."""
