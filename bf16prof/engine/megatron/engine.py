"""megatron-core's engine for a job: `DistributedDataParallel` with its contiguous buffers, and the
mixed-precision optimizer over them.

What Megatron-LM does around them in a step (megatron/training/training.py, `train_step`;
core/pipeline_parallel/schedules.py, `forward_backward_no_pipelining`) is done here, so that our
loop drives it as it drives DeepSpeed's: `backward`, then `step`, of every micro-step. Communication
does not overlap with computation, as by default.

megatron-core asks for CUDA devices by name. Where there are none, whoever builds it wears the face
(`scripts/face`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bf16prof.cases import Job
from bf16prof.engine.megatron.settings import settings_of
from bf16prof.models.modules import build_trained


class MegatronEngine(nn.Module):
    """What trains a model: called as the model is, and told of every loss and every end of a
    micro-step.

    `module`: the model; `optimizer`: megatron-core's, which holds master parameters;
    `basic_optimizer`: the Adam in it.
    """

    def __init__(self, ranks: Any, chain: Any, micro_steps: int) -> None:
        super().__init__()
        self._ranks, self._chain, self._micro_steps, self._done = ranks, chain, micro_steps, 0
        self.module: nn.Module = ranks.module
        (self.optimizer,) = chain.chained_optimizers
        self.basic_optimizer = self.optimizer.optimizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device

    @property
    def contiguous(self) -> list[Any]:
        """The buffers that parameters and gradients are views of, one per dtype
        (core/distributed/param_and_grad_buffer.py)."""
        return list(self._ranks.buffers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's. The first of a step lets go of the last step's gradients."""
        if self.training and self._done == 0:
            self._ranks.zero_grad_buffer()
            self._chain.zero_grad()
        return self._ranks(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add gradients up in the buffers; after the last micro-step ranks reduce them."""
        self._chain.scale_loss(loss / self._micro_steps).backward()
        self._done += 1
        if self._done == self._micro_steps:
            self._ranks.finish_grad_sync()

    def step(self) -> None:
        """A micro-step is over; after the last one the optimizer steps."""
        if self._done == self._micro_steps:
            self._done = 0
            self._chain.step()


def build_megatron_engine(job: Job) -> MegatronEngine:
    """The engine of a job, on the device that `torch.cuda` calls current; the process group must be
    initialised.

    The model is cast whole and moved as Megatron-LM's `get_model` does it. Its own sizes mean
    nothing to the buffers, so the configuration that they are handed has those of a model of one
    unit.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    workload, options = job.profile.workload, settings_of(job)
    torch.manual_seed(workload.seed)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model = build_trained(job.profile).bfloat16().cuda(torch.cuda.current_device())
    bf16: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16}
    ranks = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, **bf16),
        DistributedDataParallelConfig(**options),
        model,
    )
    settings = OptimizerConfig(use_distributed_optimizer=options["use_distributed_optimizer"], **_of_adam(job), **bf16)
    chain = get_megatron_optimizer(settings, [ranks], use_gloo_process_groups=False)
    engine = MegatronEngine(ranks, chain, workload.gradient_accumulation_steps)
    engine.train()
    return engine


def _of_adam(job: Job) -> dict[str, Any]:
    """The profile's optimizer in megatron-core's words; gradients are clipped as by default."""
    said = job.profile.optimizer
    beta1, beta2 = said.betas
    return {
        "optimizer": "adam", "lr": said.lr, "adam_beta1": beta1, "adam_beta2": beta2, "adam_eps": said.eps,
        "weight_decay": said.weight_decay, "decoupled_weight_decay": said.type == "AdamW",
    }  # fmt: skip
