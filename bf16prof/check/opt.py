"""OPT as transformers 4.28 ran it, for published runs of 2023: today's model, with what that
release keeps otherwise (modeling_opt.py).

* Attention: `torch.max` holds the scores above the least number of their dtype, and keeps one more
  matrix of them per layer for backward.
* Loss: the logits but for those of the last position are copied and stay in their dtype; today's
  library makes fp32 ones of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bf16prof.imports.published import find_published

NAME = "transformers-4.28"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`OPTAttention.forward` from the scores on; queries come scaled."""
    scores = torch.matmul(query, key.transpose(2, 3))
    if attention_mask is not None:
        least = torch.tensor(torch.finfo(scores.dtype).min, device=scores.device)
        scores = torch.max(scores + attention_mask, least)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    kept = functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(kept, value).transpose(1, 2).contiguous(), weights


def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The end of `OPTForCausalLM.forward`."""
    shifted = logits[..., :-1, :].contiguous()
    return functional.cross_entropy(shifted.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))


def make() -> nn.Module:
    """OPT-1.3B."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    from bf16prof.models.modules import build

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    settings: Any = find_published("opt-1.3b-single").runs[0].job.profile.model
    model: Any = build(settings, activation_checkpointing=False)
    model.set_attn_implementation(NAME)
    model.loss_function = loss
    made: nn.Module = model
    return made
