"""Phase marks: when init, forward, backward, step and an evaluation begin and end, attached to an
engine rather than to a training loop.

A mark closes the phase that is open and opens the next, so that everything a training script does
between two marks (its loss function, its data) belongs to the phase before it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from bf16prof.engine.pipeline import mark_instructions
from bf16prof.records import merge_phases
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Phase


class PhaseMeter(Protocol):
    """What phase marks need of a memory probe."""

    def allocated_bytes(self) -> int:
        """Bytes in live tensors now."""
        ...

    def take_phase_peak(self) -> int:
        """The highest of `allocated_bytes` since the last call; starts again from now."""
        ...


class PhaseMarks:
    """Collects the peak and the end of each phase; phases that come several times in a step keep
    the highest peak and the last end.

    `settle`, where there is one, is called before every reading: it waits until what is free is
    counted as free. Time that is measured must not contain such waits, so it is unset for timed
    steps. `on_mark` is told of each phase that begins.
    """

    def __init__(
        self, meter: PhaseMeter, settle: Callable[[], None] | None = None, on_mark: Callable[[Phase | None], None] = lambda _: None
    ) -> None:
        self.settle = settle
        self._on_mark = on_mark
        self._meter = meter
        self._open: Phase | None = None
        self._done: dict[Phase, PhaseMemory] = {}
        self._trains = False
        self.between = 0
        """The highest of all times after the first forward pass when no phase was open."""

    @property
    def phase(self) -> Phase | None:
        """The open phase."""
        return self._open

    def mark(self, phase: Phase | None) -> None:
        """Close the open phase and open this one (`None`: open none)."""
        if self.settle is not None:
            self.settle()
        peak, end = self._meter.take_phase_peak(), self._meter.allocated_bytes()
        if self._open is not None:
            self._done = merge_phases(self._done, {self._open: PhaseMemory(peak, end)})
        elif self._trains:
            self.between = max(self.between, peak)
        self._trains |= phase is Phase.FORWARD
        self._open = phase
        self._on_mark(phase)

    def take(self) -> dict[Phase, PhaseMemory]:
        """The phases since the last call, in the order of `Phase`."""
        done, self._done = self._done, {}
        return {phase: done[phase] for phase in Phase if phase in done}


class PhaseClock:
    """Seconds in each phase, from mark to mark, added up over micro-steps.

    `stamp` notes a moment without waiting (the clock, or an event on a GPU's stream), `between`
    gives the seconds from one to another.
    """

    def __init__(self, stamp: Callable[[], Any] = time.perf_counter, between: Callable[[Any, Any], float] = lambda a, b: b - a) -> None:
        self._stamp, self._between = stamp, between
        self._marks: list[tuple[Phase | None, Any]] = []

    def mark(self, phase: Phase | None) -> None:
        """A phase begins now (`None`: none does)."""
        self._marks.append((phase, self._stamp()))

    def take(self) -> dict[Phase, float]:
        """Seconds by phase since the last call, in the order of `Phase`; the phase that is open
        does not count."""
        marks, self._marks = self._marks, self._marks[-1:]
        return seconds_by_phase(marks, self._between)


def seconds_by_phase(marks: Iterable[tuple[Phase | None, Any]], between: Callable[[Any, Any], float]) -> dict[Phase, float]:
    """Seconds in each phase, in the order of `Phase`. `marks`: the phases that begin, each with its
    stamp; `between` gives the seconds from one stamp to another."""
    found: dict[Phase, float] = {}
    for (phase, begin), (_, end) in itertools.pairwise(marks):
        if phase is not None:
            found[phase] = found.get(phase, 0.0) + between(begin, end)
    return {phase: found[phase] for phase in Phase if phase in found}


def attach(engine: Any, marks: PhaseMarks) -> None:
    """Let a DeepSpeed engine set the marks itself: forward, backward and step at their entry, none
    when step returns.

    A forward pass in eval mode is one of an evaluation.
    """
    if hasattr(engine, "_INSTRUCTION_MAP"):
        mark_instructions(engine, marks.mark)
        return
    engine.register_forward_pre_hook(lambda *_: marks.mark(Phase.FORWARD if engine.module.training else Phase.EVAL))
    engine.backward = _marked(engine.backward, marks, Phase.BACKWARD)
    engine.step = _marked(engine.step, marks, Phase.STEP, after=True)


def _marked(method: Callable[..., Any], marks: PhaseMarks, phase: Phase, *, after: bool = False) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        marks.mark(phase)
        result = method(*args, **kwargs)
        if after:
            marks.mark(None)
        return result

    return call
