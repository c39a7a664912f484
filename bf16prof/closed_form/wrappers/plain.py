"""No wrapper: the basic optimizer works on the parameters themselves (stage 0 in fp32, or in one
dtype throughout)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import FP32_BYTES
from bf16prof.closed_form.optimizer import optimizer_states, update
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.wrappers.stage0 import ReplicatedOptimizer
from bf16prof.engine import labels
from bf16prof.engine.config import clips_gradients
from bf16prof.models.autograd.events import GRADIENT

if TYPE_CHECKING:
    from bf16prof.closed_form.strategy import Strategy


class PlainOptimizer(ReplicatedOptimizer):
    """The basic optimizer alone."""

    keeps_a_copy: ClassVar[bool] = False

    def states(self) -> list[Storages]:
        """The parameters, and the optimizer's states."""
        sizes = [self.parameter_bytes * n for n in self.engine.numels]
        parameters = allocation(labels.PARAMETERS, sizes, "the model's own tensors")
        return [parameters, *optimizer_states(self.engine, self.engine.numels, shapes=self.engine.shapes)]

    def initial(self, meter: Meter) -> None:
        """The model, and nothing else before the first step."""

    def step(self, meter: Meter, gradients: Strategy) -> None:
        """The gradients of the parameters are used as they are and then dropped."""
        self._clip(meter)
        update(self.engine, meter, gradients.sizes)
        meter.give(GRADIENT, *gradients.sizes)

    def _clip(self, meter: Meter) -> None:
        """utils.py clip_grad_norm_, which the engine calls itself: norms, each of a gradient in
        fp32 (clipping is on by default)."""
        if not clips_gradients(self.config):
            return
        numels = self.engine.numels
        casts = self.facts.gradient_dtype != "fp32"
        before = numels.index(max(numels)) if casts else len(numels) - 1
        meter.touch(labels.GRADIENT_NORM, *[FP32_BYTES] * (before + 1), FP32_BYTES * max(numels) * casts)
