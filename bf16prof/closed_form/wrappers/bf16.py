"""`BF16_Optimizer` (bf16_optimizer.py): stage 1 with bf16 parameters and gradients that are
accumulated in fp32, in full on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import FP32_BYTES
from bf16prof.closed_form.gradients import Accumulation
from bf16prof.closed_form.optimizer import optimizer_states, update
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.transfers import Ranks
from bf16prof.closed_form.wrappers.flat import FlatOptimizer
from bf16prof.closed_form.wrappers.wrapper import global_norm
from bf16prof.engine import labels
from bf16prof.models.autograd.events import GRADIENT
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Collective, Phase

if TYPE_CHECKING:
    from bf16prof.cases import Job
    from bf16prof.closed_form.strategy import Strategy
    from bf16prof.closed_form.walks import Walked


class Bf16Optimizer(FlatOptimizer):
    """Parameters and master copies are flat and partitioned; gradients are flat and whole."""

    updated_by: ClassVar[str] = "bf16_optimizer.py update_lp_params"

    @property
    def layout_settings(self) -> ZeroSettings:
        """It reads no ZeRO settings (_setup_for_real_optimizer)."""
        return ZeroSettings()

    def states(self) -> list[Storages]:
        """Flat parameters, a partition of the master copy and of the optimizer's states, and all
        gradients."""
        source = "bf16_optimizer.py _setup_for_real_optimizer"
        return [
            allocation(labels.FLAT_PARAMETERS, self.parameter_bytes * self.flat_numel, source),
            allocation(labels.MASTER_PARAMETERS, FP32_BYTES * self.partition_numel, source),
            allocation(labels.GRADIENT_PARTITION, self.gradient_bytes * self.flat_numel, f"{source}: full size, not partitioned"),
            *optimizer_states(self.engine, [self.partition_numel]),
            global_norm(),
        ]

    def initial(self, meter: Meter) -> None:
        """The model is flattened, its partition cast from a clone, and gradients are made for all
        of it."""
        size, partition = self.parameter_bytes, self.partition_numel
        self.flatten_the_model(meter)
        meter.take(labels.FLAT_PARAMETERS, size * partition)
        meter.take(labels.MASTER_PARAMETERS, FP32_BYTES * partition)
        meter.give(labels.FLAT_PARAMETERS, size * partition)
        meter.take(labels.GRADIENT_PARTITION, self.gradient_bytes * self.flat_numel)

    def strategy_settings(self, job: Job) -> Accumulation:
        """Gradients are added to those in fp32."""
        return Accumulation(self.communication_bytes, bool(self.config["bf16"].get("immediate_grad_update")))

    def step(self, meter: Meter, gradients: Strategy) -> None:
        """The master gradients are the ones that have been accumulated."""
        update(self.engine, meter, [FP32_BYTES * self.partition_numel])
        meter.give(GRADIENT, *gradients.sizes)

    def collectives(self, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
        """The flat buffer of gradients, then that of the updated parameters."""
        size = self.communication_bytes * self.flat_numel
        source = "bf16_optimizer.py get_grads_for_reduction"
        yield ranks.transfer("gradients", Collective.ALL_REDUCE, Phase.BACKWARD, 1, size, source)
        yield self.updated_parameters(ranks)
