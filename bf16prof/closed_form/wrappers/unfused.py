"""`FP16_UnfusedOptimizer` (fp16/unfused_optimizer.py): stage 0 in bf16 or fp16, with an fp32 copy
of every parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import FP32_BYTES
from bf16prof.closed_form.optimizer import layout_of, optimizer_states, update
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.wrappers.stage0 import ReplicatedOptimizer
from bf16prof.engine import labels
from bf16prof.models.autograd.events import GRADIENT

if TYPE_CHECKING:
    from bf16prof.closed_form.strategy import Strategy


class UnfusedOptimizer(ReplicatedOptimizer):
    """Nothing is flat."""

    def states(self) -> list[Storages]:
        """Parameters, master copies and the optimizer's states, each of the shape of its
        parameter."""
        numels = self.engine.numels
        return [
            allocation(labels.PARAMETERS, [self.parameter_bytes * n for n in numels], "the model's own tensors"),
            allocation(labels.MASTER_PARAMETERS, [FP32_BYTES * n for n in numels], "fp16/unfused_optimizer.py __init__"),
            *optimizer_states(self.engine, numels, shapes=self.engine.shapes),
        ]

    def initial(self, meter: Meter) -> None:
        """The master copies, and a first call of the optimizer on zero gradients of both."""
        sizes = [FP32_BYTES * n for n in self.engine.numels]
        first = [*(self.parameter_bytes * n for n in self.engine.numels), *sizes]
        meter.take(labels.MASTER_PARAMETERS, *sizes)
        meter.take(labels.FIRST_GRADIENTS, *first)
        for state in layout_of(self.engine).states:
            meter.take(labels.optimizer_state(state.component, state.key), *state.sizes("fp32", self.engine.shapes))
        update(self.engine, meter, sizes)
        meter.give(labels.FIRST_GRADIENTS, *first)

    def step(self, meter: Meter, gradients: Strategy) -> None:
        """An fp32 copy of every gradient."""
        copies = [FP32_BYTES * n for n in self.engine.numels]
        meter.take(labels.STEP_GRADIENTS, *copies)
        update(self.engine, meter, copies)
        meter.give(labels.STEP_GRADIENTS, *copies)
        meter.give(GRADIENT, *gradients.sizes)
