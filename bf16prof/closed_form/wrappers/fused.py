"""`FP16_Optimizer` (fp16/fused_optimizer.py): stage 0 in bf16 or fp16 over FusedAdam, with one flat
fp32 copy of all parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import FP32_BYTES
from bf16prof.closed_form.optimizer import optimizer_states
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.wrappers.stage0 import ReplicatedOptimizer
from bf16prof.engine import labels
from bf16prof.models.autograd.events import GRADIENT
from bf16prof.vocabulary import Component

if TYPE_CHECKING:
    from bf16prof.closed_form.strategy import Strategy

MOMENTS = labels.optimizer_state(Component.MOMENTUM, "exp_avg"), labels.optimizer_state(Component.VARIANCE, "exp_avg_sq")
"""FusedAdam's, which is the only optimizer that this wrapper is put around."""


class FusedOptimizer(ReplicatedOptimizer):
    """Everything is flat."""

    def states(self) -> list[Storages]:
        """Flat parameters, their master copy, and the states of one tensor."""
        total = self.partition_numel
        source = "fp16/fused_optimizer.py __init__"
        return [
            allocation(labels.FLAT_PARAMETERS, self.parameter_bytes * total, source),
            allocation(labels.MASTER_PARAMETERS, FP32_BYTES * total, source),
            *optimizer_states(self.engine, [total]),
        ]

    def initial(self, meter: Meter) -> None:
        """Flat parameters, the master copy, and a first call of the optimizer on zero gradients."""
        size, total = self.parameter_bytes, self.partition_numel
        meter.take(labels.FLAT_PARAMETERS, size * total)
        meter.give(labels.THE_MODEL, *(size * n for n in self.engine.numels))
        meter.take(labels.THE_MODEL, size * total)  # a clone
        meter.take(labels.MASTER_PARAMETERS, FP32_BYTES * total)
        meter.give(labels.THE_MODEL, size * total)
        meter.take(labels.FIRST_GRADIENTS, FP32_BYTES * total)
        for label in MOMENTS:
            meter.take(label, FP32_BYTES * total)
        meter.give(labels.FIRST_GRADIENTS, FP32_BYTES * total)

    def step(self, meter: Meter, gradients: Strategy) -> None:
        """An fp32 copy of every gradient, then a flat one; all others go before the update."""
        copies = [FP32_BYTES * n for n in self.engine.numels]
        flat = FP32_BYTES * self.partition_numel
        meter.take(labels.STEP_GRADIENTS, *copies)
        meter.take(labels.STEP_GRADIENTS, flat)
        meter.give(labels.STEP_GRADIENTS, *copies)
        meter.give(GRADIENT, *gradients.sizes)
        meter.give(labels.STEP_GRADIENTS, flat)
