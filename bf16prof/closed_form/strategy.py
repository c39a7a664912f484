"""What becomes of gradients in forward and backward, and at stage 3 of parameters: one strategy for
each way that DeepSpeed has.

A walk (`passes.walk`) tells the strategy what happens in the model; the strategy tells a `Meter`
what DeepSpeed allocates and frees then. An optimizer wrapper says which strategy it uses by
`StrategySettings`, which hold nothing else, so that jobs with equal settings share one walk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from bf16prof.models.autograd.events import ParameterKey
from bf16prof.vocabulary import Phase

if TYPE_CHECKING:
    from bf16prof.closed_form.passes import Handler, Meter
    from bf16prof.closed_form.program import Program
    from bf16prof.closed_form.walks import WalkPlan


@dataclass
class Launched:
    """What a micro-step gives to collectives: parameters that are gathered together, with the
    phase, and gradients reduced together."""

    gathered: list[tuple[Phase, tuple[ParameterKey, ...]]] = field(default_factory=list)
    reduced: list[tuple[ParameterKey, ...]] = field(default_factory=list)


class Strategy(ABC):
    """One way to keep and to reduce gradients."""

    launched: Launched
    """Of the micro-step that runs, or ran last."""
    differs_at_first: bool = False
    """Whether the first step of a job allocates otherwise than later ones."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each gradient that waits for the optimizer's step where backward has made it."""
        return ()

    @abstractmethod
    def start(self, *, is_boundary: bool) -> None:
        """A micro-step begins, perhaps the last before the optimizer's step."""

    @abstractmethod
    def ready(self, key: ParameterKey, size: int) -> None:
        """A gradient of so many bytes is there: the program has counted it."""

    @abstractmethod
    def finish(self) -> None:
        """Backward is over."""

    def handlers(self) -> dict[str, Handler]:
        """What it does, by the kind of event."""
        return {"gradient": self.ready}


class StrategySettings(ABC):
    """The settings of a strategy. Two that are equal make the same."""

    is_partitioned: ClassVar[bool] = False
    """Whether parameters are partitioned, and gathered by hooks on modules (stage 3)."""

    @abstractmethod
    def strategy(self, plan: WalkPlan, meter: Meter, program: Program) -> Strategy:
        """A new strategy, which tells this meter."""
