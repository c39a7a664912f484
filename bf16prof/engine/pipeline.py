"""Optimizer steps of a pipeline: DeepSpeed's PipelineEngine runs the whole schedule of a step
(1F1B), which our loop only feeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bf16prof.models.pipelined import is_pipeline
from bf16prof.vocabulary import Phase

if TYPE_CHECKING:
    from torch import Tensor

LABELS = "labels"
"""The tensor of a batch that the loss is called with; all others go into the first layer."""

PHASES = {
    "LoadMicroBatch": Phase.FORWARD,
    "RecvActivation": Phase.FORWARD,
    "ForwardPass": Phase.FORWARD,
    "SendActivation": Phase.FORWARD,
    "RecvGrad": Phase.BACKWARD,
    "BackwardPass": Phase.BACKWARD,
    "SendGrad": Phase.BACKWARD,
    "ReduceTiedGrads": Phase.BACKWARD,
    "ReduceGrads": Phase.BACKWARD,
    "OptimizerStep": Phase.STEP,
}
"""The phase of each instruction of a schedule (runtime/pipe/schedule.py)."""


class PipelineLoop:
    """Runs optimizer steps on a PipelineEngine. It holds nothing itself: what lasts between steps
    is the engine's."""

    def __init__(self, engine: Any, next_batch: Callable[[], dict[str, Tensor]]) -> None:
        assert is_pipeline(engine.module), "any other engine has TrainingLoop"
        self._engine = engine
        self._batches: Iterator[Any] = iter(lambda: _cut(next_batch()), None)

    def step(self) -> float:
        """One optimizer step; the mean loss of the job, which the last stage tells the others."""
        loss: float = self._engine.train_batch(data_iter=self._batches).item()
        return loss

    @property
    def kept(self) -> dict[str, Tensor | list[Tensor]]:
        """Nothing."""
        return {}


def _cut(batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """What goes into the first layer - one tensor, or several as a tuple - and the labels."""
    inputs = tuple(tensor for name, tensor in batch.items() if name != LABELS)
    return inputs[0] if len(inputs) == 1 else inputs, batch[LABELS]


def mark_instructions(engine: Any, mark: Callable[[Phase | None], None]) -> None:
    """Let a PipelineEngine mark the phase of each instruction that it carries out: its forward,
    backward and step are never called."""
    phase: list[Phase | None] = [None]

    def enter(wanted: Phase | None) -> None:
        if wanted is not phase[0]:
            phase[0] = wanted
            mark(wanted)

    def marked(method: Callable[..., Any], wanted: Phase) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            enter(wanted)
            method(*args, **kwargs)
            if wanted is Phase.STEP:
                enter(None)

        return call

    engine._INSTRUCTION_MAP = {kind: marked(method, PHASES[kind.__name__]) for kind, method in engine._INSTRUCTION_MAP.items()}
