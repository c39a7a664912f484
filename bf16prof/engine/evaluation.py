"""An evaluation between two steps, as the Trainer of transformers makes one (5.24.0, trainer.py,
`evaluation_loop`).

* The loss of each batch is repeated by the sequences of the batch and gathered from all ranks.
  Where `prediction_loss_only` is false (a Trainer with `compute_metrics`), logits and labels are
  gathered as well (accelerate/utils/operations.py, `_gpu_gather`): each rank has those of all
  ranks.
* What was gathered is put beside what is there already, which makes a new tensor of both
  (`nested_concat`), and stays on the device until the end, or until `eval_accumulation_steps`
  batches are over.
* A batch, its logits and its labels are variables of the loop: they live until those of the next
  batch are there.

The copies that the host keeps are not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, distributed

from bf16prof.profiles.schema import EvaluationSettings

Batch = dict[str, Tensor]
Predict = Callable[[Batch], tuple[Tensor, list[Tensor]]]
"""From a batch to its loss and to everything else that the model returned."""


def evaluate(settings: EvaluationSettings, next_batch: Callable[[], Batch], predict: Predict) -> float:
    """Evaluate so many batches on a model in eval mode; the mean loss over all ranks."""
    losses, predictions, labels = _Kept(), _Kept(), _Kept()
    sums: list[float] = []
    for number in range(1, settings.batches_run + 1):
        batch = next_batch()
        loss, logits, said = _predicted(settings, predict, batch)
        loss = _gathered(loss.repeat(settings.per_device_eval_batch_size))
        losses.add([loss])
        if not settings.prediction_loss_only:
            logits = [_gathered(each) for each in logits]
            predictions.add(logits)
            said = [_gathered(each) for each in said]
            labels.add(said)
        if settings.eval_accumulation_steps and number % settings.eval_accumulation_steps == 0:
            sums += losses.taken()
            predictions.taken(), labels.taken()
            del loss, logits, said, batch
            get_accelerator().empty_cache()
    sums += losses.taken()
    predictions.taken(), labels.taken()
    return sum(sums) / len(sums)


def _predicted(settings: EvaluationSettings, predict: Predict, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`prediction_step`."""
    with torch.no_grad():
        loss, others = predict(batch)
        loss = loss.detach().mean()
    if settings.prediction_loss_only:
        return loss, [], []
    return loss, [each.detach() for each in others], [batch["labels"]] if "labels" in batch else []


def _gathered(tensor: Tensor) -> Tensor:
    """The tensor of all ranks, along its first dimension."""
    own = (tensor if tensor.dim() else tensor.clone()[None]).contiguous()
    whole = torch.empty(distributed.get_world_size() * own.numel(), dtype=own.dtype, device=own.device)
    distributed.all_gather_into_tensor(whole, own.view(-1))  # gloo wants one shape, NCCL none
    return whole.view(-1, *own.shape[1:])


class _Kept:
    """`EvalLoopContainer` (trainer_pt_utils.py): what the batches so far have given, in one tensor
    each."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] | None = None

    def add(self, tensors: list[Tensor]) -> None:
        """Put these beside those that are there."""
        if self._tensors is None:
            self._tensors = tensors
        else:
            self._tensors = [torch.cat((old, new), dim=0) for old, new in zip(self._tensors, tensors, strict=True)]

    def taken(self) -> list[float]:
        """Copy them to the host, and let go of them; a mean of the first where it has numbers."""
        tensors, self._tensors = self._tensors or [], None
        on_host = [each.cpu() for each in tensors]
        return [on_host[0].float().mean().item()] if on_host and on_host[0].is_floating_point() else []
