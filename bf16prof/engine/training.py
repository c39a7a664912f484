"""The model, the engine and one optimizer step of a job, as the published example's loop writes it.

That loop keeps logits, loss and batch in local variables until the next step replaces them, so they are alive when memory is read
between steps; ours keeps them as attributes for the same reason, and `kept` names them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bf16prof.cases import Job
from bf16prof.engine.config import deepspeed_config, engine_facts
from bf16prof.models.modules import build

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Batch = tuple[Tensor, Tensor]
"""Token ids and labels, both int64 [micro_batch, sequence]."""


def build_engine(job: Job) -> Any:
    """The DeepSpeed engine of a job, on the accelerator that DeepSpeed finds; the process group must be initialised."""
    import deepspeed

    workload = job.profile.workload
    torch.manual_seed(workload.seed)
    model = build(job.profile.model, activation_checkpointing=workload.activation_checkpointing)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=deepspeed_config(job))
    engine.train()
    return engine


def parameter_count(engine: Any) -> int:
    """Elements of the model's parameters, whole ones where ZeRO-3 has cut them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


class TrainingLoop:
    """Runs optimizer steps on an engine and holds what such a loop holds between them."""

    def __init__(self, engine: Any, job: Job, next_batch: Callable[[], Batch]) -> None:
        self._engine = engine
        self._next_batch = next_batch
        self._loss_function = nn.CrossEntropyLoss()
        self._micro_steps = job.profile.workload.gradient_accumulation_steps
        self._autocast_dtype = TORCH_DTYPES.get(engine_facts(deepspeed_config(job)).autocast_dtype)
        self.input_ids: Tensor | None = None
        self.labels: Tensor | None = None
        self.logits: Tensor | None = None
        self.loss: Tensor | None = None

    def step(self) -> float:
        """One optimizer step; the mean loss of its micro-steps.

        Each micro-step's loss is read as soon as the micro-step is over: keeping its tensor for later would show up in the memory.
        """
        losses = []
        for _ in range(self._micro_steps):
            self.input_ids, self.labels = self._next_batch()
            with self._autocast():
                self.logits = self._engine(self.input_ids)
                self.loss = self._loss_function(self.logits.view(-1, self.logits.shape[-1]), self.labels.view(-1))
            self._engine.backward(self.loss)
            self._engine.step()
            losses.append(self.loss.item())
        return sum(losses) / len(losses)

    @property
    def kept(self) -> dict[str, Tensor]:
        """The tensors that the loop keeps alive between steps, by name."""
        named = {"logits": self.logits, "loss": self.loss, "input ids": self.input_ids, "labels": self.labels}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self._engine.device.type, dtype=self._autocast_dtype)
