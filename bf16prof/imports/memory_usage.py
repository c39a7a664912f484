"""DeepSpeed's `see_memory_usage` (deepspeed/runtime/utils.py), which `memory_breakdown` in a
DeepSpeed JSON switches on: a message, then

    MA 25.74 GB         Max_MA 31.38 GB         CA 37.91 GB         Max_CA 38 GB

of rank 0: allocated and reserved, now and the most since the last such line, because each call
resets the peaks. Its GB are 2**30 bytes, rounded to two decimals, the last one to none. The
messages of the engine say which phase lies between two lines; so do a user's own that say before or
after forward, backward or step. Versions before 0.15 print some lines of init without being asked.

What is proved: a phase has a peak once a line closes it, and an end only if that line says so.
Until then a peak is a lower bound. A log that ends in init says nothing of the whole run.
"""

from __future__ import annotations

import re

from bf16prof.imports.finding import GIB, NUMBER, Finding, Reading, highest, known, rounded
from bf16prof.imports.instants import INSTANT_MARKS, instant_of
from bf16prof.vocabulary import TRAINING, Phase

_LINE = re.compile(rf"\bMA ({NUMBER}) GB\s+Max_MA ({NUMBER}) GB\s+CA ({NUMBER}) GB\s+Max_CA ({NUMBER}) GB")
_CPU = re.compile(r"CPU Virtual Memory: +used = ")


class MemoryUsageReader:
    """Reads the lines of rank 0, and keeps what each interval between two of them belongs to."""

    format = "DeepSpeed's see_memory_usage"
    marks = ("max_ma", "cpu virtual memory", *INSTANT_MARKS)

    def __init__(self) -> None:
        self._instant: tuple[str, Phase | None] = ("", None)
        """What the last message since the last reading names: other ranks may print between it and
        the reading."""
        self._open: Phase | None = Phase.INIT
        self._peaks: dict[Phase, list[Reading]] = {}
        self._ends: dict[Phase, Reading] = {}
        self._closed: set[Phase] = set()
        self._all: list[Reading] = []
        self._reserved: list[Reading] = []
        self._reserved_peaks: list[Reading] = []
        self._allocated: Reading | None = None
        self._trains = self._is_inside = False

    def line(self, text: str) -> int:
        """Read one line."""
        if _CPU.search(text):
            return 1
        found = _LINE.search(text)
        if found is None:
            said = instant_of(text)
            self._instant = said if said[0] else self._instant
            return 0
        allocated, peak, reserved, reserved_peak = (rounded(t, GIB, 2 if "." in t else 0) for t in found.groups())
        self._all.append(peak)
        self._reserved.append(reserved)
        self._reserved_peaks.append(reserved_peak)
        self._interval(*self._instant, allocated, peak)
        self._instant = ("", None)
        return 2

    def finding(self) -> Finding | None:
        """What the lines say."""
        if not self._all:
            return None
        whole_step = self._allocated is not None
        whole_run = highest(self._all) if self._trains else None
        training = highest([peak for phase in TRAINING for peak in self._peaks.get(phase, [])])
        readings = known(
            allocated_bytes=self._allocated,
            run_peak_allocated_bytes=_proved(whole_run, whole_step),
            peak_allocated_bytes=_proved(training, self._closed >= set(TRAINING)),
            reserved_bytes=_proved(self._most_reserved(), whole_step),
        )
        for phase in Phase:
            peak = _proved(highest(self._peaks.get(phase, [])), phase in self._closed)
            readings |= known(**{f"phases.{phase}.peak_bytes": peak, f"phases.{phase}.end_bytes": self._ends.get(phase)})
        notes = tuple(f"{self.format}: {note}" for note in self._notes(whole_step))
        return Finding(self.format, readings, notes=notes, resets_peaks=True, open_phase=self._open if self._is_inside else None)

    def _notes(self, whole_step: bool) -> list[str]:
        notes = ["of rank 0, up to the last of these lines"]
        if not self._trains:
            return [*notes, "the last of them is in init: nothing is said of training, and the peak of init is a lower bound"]
        if not whole_step:
            notes.append("no line after a step: memory allocated between steps is not known, and peaks are lower bounds")
        return notes

    def _interval(self, place: str, named: Phase | None, allocated: Reading, peak: Reading) -> None:
        """Give the time since the last line to the phase that was open, or that this line ends."""
        before = self._open
        ends = named if place == "after" else before
        mixed = before is Phase.INIT and ends is not Phase.INIT  # the first line after init is one after a phase: both are in its peak
        if ends is not None and not mixed:
            self._peaks.setdefault(ends, []).append(peak)
            if named is not None:
                self._closed.add(ends)
                self._ends[ends] = allocated
        if named is not None:
            self._trains = True
            self._open = named
            self._is_inside = place == "before"
        if place == "after" and named is Phase.STEP:
            self._allocated, self._open = allocated, None

    def _most_reserved(self) -> Reading | None:
        most, now = highest(self._reserved_peaks), highest(self._reserved)
        return most.no_lower_than(now) if most and now else None


def _proved(reading: Reading | None, is_complete: bool) -> Reading | None:
    """The reading, as a lower bound where what it is of is not over."""
    return reading if reading is None or is_complete else reading.as_floor()
