"""Training on pairs of answers as TRL does: direct preference optimization (DPO), and reward
models.

A micro-batch has so many pairs; both answers of all of them, chosen and rejected, are rows of one
batch (trl/trainer/dpo_trainer.py, DataCollatorForPreference). A reward model gives each row one
number, of which that of the chosen answer is to be the larger (reward_trainer.py, compute_loss).

DPO has a policy, and a reference that does not learn. The reference is a second model, prepared by
DeepSpeed: partitioned at ZeRO-3, else whole on every rank (trl/models/utils.py, prepare_deepspeed).
With an adapter it is the policy with the adapter switched off. Log-probabilities are taken from the
whole logits (trl/trainer/utils.py, selective_log_softmax).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bf16prof.engine.config import handed_to_deepspeed

BETA = 0.1
"""TRL's default; no byte depends on it."""

OF_TRAINING = ("optimizer", "scheduler")
"""What TRL takes away from the reference's configuration."""

OF_STATES = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")
"""What it leaves there, and DeepSpeed refuses at stage 0 (runtime/config.py, _do_error_check): a
reference has none of these."""


def reference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's JSON for the reference: that of the policy without what trains."""
    handed = {block: keys for block, keys in handed_to_deepspeed(config).items() if block not in OF_TRAINING}
    zero = {key: value for key, value in handed["zero_optimization"].items() if key != "offload_optimizer"}
    for block in ("bf16", "fp16"):
        if block in handed:
            handed[block] = {key: value for key, value in handed[block].items() if key not in OF_STATES}
    return {**handed, "zero_optimization": {**zero, "stage": 3 if zero["stage"] == 3 else 0}}


Call = Callable[..., Any]
"""Runs a model on the named tensors of a batch."""


def preference_loss(policy: Call, reference: Call | None, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss of a batch, and what the policy returned. Without a reference its log-probabilities
    came with the batch."""
    called = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = policy(**called)
    chosen, rejected = _log_probabilities(outputs.logits, batch).chunk(2)
    if reference is None:
        their_chosen, their_rejected = batch["reference_chosen"], batch["reference_rejected"]
    else:
        with torch.no_grad():
            their_chosen, their_rejected = _log_probabilities(reference(**called).logits, batch).chunk(2)
    ratios = (chosen - their_chosen) - (rejected - their_rejected)
    return -nn.functional.logsigmoid(BETA * ratios).mean(), outputs


def reward_loss(model: Call, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss of a batch, and what the model returned."""
    outputs = model(**batch)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean(), outputs


def _log_probabilities(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Of each row, the log-probability of its answer."""
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return (_selected(logits[:, :-1], labels) * mask).sum(dim=1)


def _selected(logits: Tensor, labels: Tensor) -> Tensor:
    """`selective_log_softmax`: row by row, and in low precision by way of all log-probabilities of
    a row."""
    index = labels.unsqueeze(-1)
    if logits.dtype is torch.float32:
        chosen = logits.gather(dim=-1, index=index)
        sums = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return (chosen - sums.unsqueeze(-1)).squeeze(-1)
    rows = [nn.functional.log_softmax(row, dim=-1).gather(dim=-1, index=each) for row, each in zip(logits, index, strict=True)]
    return torch.stack(rows).squeeze(-1)


def switched_off(model: Any) -> AbstractContextManager[Any]:
    """The context in which PEFT's wrapper runs the model without its adapter."""
    context: AbstractContextManager[Any] = model.disable_adapter()
    return context
