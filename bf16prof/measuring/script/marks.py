"""Phase marks of a script on a real rank. A mark within a timed step writes down what it reads and
no more; all else is done later.

An evaluation between two steps is measured closely, and belongs to no step's time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bf16prof.measuring.probes import Probe
from bf16prof.records import merge_phases
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Phase


class MarkReading(NamedTuple):
    """A moment at which a phase begins (`None`: none does): the peak since the last reading, what
    is allocated, and the time."""

    phase: Phase | None
    peak: int
    end: int
    stamp: Any


class GuestMarks:
    """Memory settles before every reading but those of steps that are `is_timed`.

    `stamp` notes the time without waiting; `on_mark` is told of each phase that begins.
    """

    def __init__(self, probe: Probe, stamp: Callable[[], Any], on_mark: Callable[[Phase | None], None] | None = None) -> None:
        self.phase: Phase | None = None
        self.is_timed = False
        self.evaluated_s = 0.0
        """Seconds of evaluations, and of the waits around them."""
        self._probe, self._stamp, self._on_mark = probe, stamp, on_mark
        self._peak, self._allocated = probe.take_phase_peak, probe.allocated_bytes
        self._readings: list[MarkReading] = []
        self._began = 0.0

    def mark(self, phase: Phase | None) -> None:
        """Close the open phase and open this one."""
        if phase is Phase.EVAL or self.phase is Phase.EVAL:
            self._evaluation(phase)
            return
        if not self.is_timed:
            self._probe.settle()
        self._read(phase)

    def take(self) -> list[MarkReading]:
        """What was read since the last call, after the last reading before that."""
        readings, self._readings = self._readings, self._readings[-1:]
        return readings

    def _read(self, phase: Phase | None) -> None:
        self._readings.append(MarkReading(phase, self._peak(), self._allocated(), self._stamp()))
        self.phase = phase
        if self._on_mark is not None:
            self._on_mark(phase)

    def _evaluation(self, phase: Phase | None) -> None:
        """It begins or ends: what was asked of the device before is done first, and is the step's
        or the evaluation's time."""
        self._probe.synchronize()
        if self.phase is not Phase.EVAL:
            self._began = time.perf_counter()
        self._probe.settle()
        self._read(phase)
        if phase is not Phase.EVAL:
            self.evaluated_s += time.perf_counter() - self._began


def memory_of(readings: Sequence[MarkReading]) -> dict[Phase, PhaseMemory]:
    """The memory of each phase that ends in these: of those that come several times the highest
    peak and the last end."""
    found: dict[Phase, PhaseMemory] = {}
    for begin, end in itertools.pairwise(readings):
        if begin.phase is not None:
            found = merge_phases(found, {begin.phase: PhaseMemory(end.peak, end.end)})
    return {phase: found[phase] for phase in Phase if phase in found}
