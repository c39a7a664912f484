"""What the wrappers of ZeRO stage 0 share: every rank holds all parameters, and the engine
all-reduces all gradients."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bf16prof.closed_form.gradients import AllReduction
from bf16prof.closed_form.transfers import Ranks
from bf16prof.closed_form.wrappers.wrapper import OptimizerWrapper
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Collective, Phase

if TYPE_CHECKING:
    from bf16prof.cases import Job
    from bf16prof.closed_form.walks import Walked


class ReplicatedOptimizer(OptimizerWrapper, ABC):
    """The optimizer of every rank updates all parameters."""

    @property
    def partition_numel(self) -> int:
        """Elements of all parameters that are trained."""
        return sum(self.engine.numels)

    def strategy_settings(self, job: Job) -> AllReduction:
        """Gradients stay where they are, and are reduced at the end of the last backward."""
        casts = self.facts.communication_dtype != self.facts.gradient_dtype
        return AllReduction(self.communication_bytes if casts else 0)

    def collectives(self, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
        """The engine all-reduces the gradients of the last micro-step, into which all have
        accumulated."""
        size = self.communication_bytes * self.partition_numel
        source = "engine.py buffered_allreduce_fallback"
        yield ranks.transfer("gradients", Collective.ALL_REDUCE, Phase.BACKWARD, len(done.reduced), size, source)
