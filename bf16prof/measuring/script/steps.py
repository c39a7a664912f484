"""The steps of a script on a real rank: while they run, readings are kept; records are made of them
when somebody asks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bf16prof.engine.phases import seconds_by_phase
from bf16prof.measuring.probes import Probe
from bf16prof.measuring.script.marks import GuestMarks, MarkReading, memory_of
from bf16prof.measuring.worker import recorded_event
from bf16prof.records import merge_phases
from bf16prof.step_records import PhaseMemory, StepRecord
from bf16prof.vocabulary import TRAINING, Phase


def stamps(probe: Probe) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Notes a moment by the device's own time, and gives the seconds from one to another once the
    device has done its work.

    Before the script uses CUDA there is no such time, and no event may be made.
    """
    from bf16prof.measuring.script.probes import is_in_use

    if probe.device_type != "cuda":
        return time.perf_counter, lambda begin, end: float(end - begin)

    def seconds(begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if begin is not None else 0.0

    return lambda: recorded_event() if is_in_use() else None, seconds


@dataclass(frozen=True, slots=True)
class _SeenStep:
    """A step that is over."""

    seconds: float
    allocated_bytes: int
    readings: list[MarkReading]
    is_warmup: bool


class SeenSteps:
    """What was seen of the steps so far. `on_mark` is told of each phase that begins."""

    def __init__(self, probe: Probe, on_mark: Callable[[Phase | None], None] | None = None) -> None:
        self._probe = probe
        stamp, self._between = stamps(probe)
        self.marks = GuestMarks(probe, stamp, on_mark)
        self.outside: dict[Phase, PhaseMemory] = {}
        """The memory of what is in no step, as far as records were asked for: of init and of
        evaluations."""
        self._seen: list[_SeenStep] = []
        self._records: list[StepRecord] = []
        self._began = 0.0

    def __len__(self) -> int:
        """How many steps are over."""
        return len(self._seen)

    def begins(self) -> None:
        """A step begins."""
        self.marks.evaluated_s, self._began = 0.0, time.perf_counter()

    def ends(self, *, is_warmup: bool, is_last: bool) -> int:
        """The step that has begun is over, and no phase is open; what is allocated now. Memory
        settles after the last."""
        seconds = time.perf_counter() - self._began - self.marks.evaluated_s
        readings = self.marks.take()
        if is_last:
            self._probe.settle()
        allocated = self._probe.allocated_bytes() if is_last else readings[-1].end
        self._seen.append(_SeenStep(seconds, allocated, readings, is_warmup))
        return allocated

    def is_init_over(self) -> None:
        """What was read so far belongs to no step."""
        self._keep(memory_of(self.marks.take()))

    def is_script_over(self) -> None:
        """Nothing more comes: an evaluation may have been the last thing that was done."""
        if self.marks.phase is Phase.EVAL:
            self.marks.mark(None)
            self._keep(memory_of(self.marks.take()))

    def records(self) -> list[StepRecord]:
        """The steps so far, without the times of phases and without losses."""
        for seen in self._seen[len(self._records) :]:
            phases = self._keep(memory_of(seen.readings))
            self._records.append(StepRecord(len(self._records), None, seen.seconds, seen.allocated_bytes, phases, seen.is_warmup))
        return self._records

    def timed_records(self) -> list[StepRecord]:
        """The steps with the times of their phases, once the device has done its work."""
        times = [seconds_by_phase([(each.phase, each.stamp) for each in seen.readings], self._between) for seen in self._seen]
        of_steps = [{phase: seconds for phase, seconds in each.items() if phase in TRAINING} for each in times]
        return [dataclasses.replace(step, phase_time_s=each) for step, each in zip(self.records(), of_steps, strict=True)]

    def _keep(self, phases: dict[Phase, PhaseMemory]) -> dict[Phase, PhaseMemory]:
        """Keep what belongs to no step; the phases of the step."""
        outside = {phase: memory for phase, memory in phases.items() if phase not in TRAINING}
        self.outside = merge_phases(self.outside, outside)
        return {phase: memory for phase, memory in phases.items() if phase in TRAINING}
