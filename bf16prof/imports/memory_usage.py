"""DeepSpeed's `see_memory_usage` (deepspeed/runtime/utils.py), which `memory_breakdown` in a DeepSpeed JSON switches on: a message, then

    MA 25.74 GB         Max_MA 31.38 GB         CA 37.91 GB         Max_CA 38 GB

of rank 0: allocated and reserved, now and the most since the last such line, because each call resets the peaks. Its GB are 2**30 bytes,
rounded to two decimals, the last one to none. The messages of the engine say which phase lies between two lines; so do a user's own
that say before or after forward, backward or step.
"""

from __future__ import annotations

import re

from bf16prof.imports.finding import GIB, NUMBER, Finding, Reading, highest, known, rounded
from bf16prof.records import TRAINING, Phase

_LINE = re.compile(rf"\bMA ({NUMBER}) GB\s+Max_MA ({NUMBER}) GB\s+CA ({NUMBER}) GB\s+Max_CA ({NUMBER}) GB")
_CPU = re.compile(r"CPU Virtual Memory: +used = ")
_INSTANT = re.compile(r"\b(before|after)\b.*\b(forward|backward|step)\b", re.IGNORECASE)


class MemoryUsageReader:
    """Reads the lines of rank 0, and keeps what each interval between two of them belongs to."""

    format = "DeepSpeed's see_memory_usage"

    def __init__(self) -> None:
        self._message: re.Match[str] | None = None
        """The last one since the last reading that says before or after which phase: other ranks may print between it and the reading."""
        self._open: Phase | None = Phase.INIT
        self._peaks: dict[Phase, list[Reading]] = {}
        self._ends: dict[Phase, Reading] = {}
        self._all: list[Reading] = []
        self._reserved: list[Reading] = []
        self._reserved_peaks: list[Reading] = []
        self._allocated: Reading | None = None

    def line(self, text: str) -> int:
        """Read one line."""
        if _CPU.search(text):
            return 1
        found = _LINE.search(text)
        if found is None:
            self._message = _INSTANT.search(text[-400:]) or self._message
            return 0
        allocated, peak, reserved, reserved_peak = (rounded(t, GIB, 2 if "." in t else 0) for t in found.groups())
        self._all.append(peak)
        self._reserved.append(reserved)
        self._reserved_peaks.append(reserved_peak)
        self._interval(self._message, allocated, peak)
        self._message = None
        return 2

    def finding(self) -> Finding | None:
        """What the lines say."""
        if not self._all:
            return None
        readings = known(
            allocated_bytes=self._allocated,
            run_peak_allocated_bytes=highest(self._all),
            peak_allocated_bytes=highest([peak for phase in TRAINING for peak in self._peaks.get(phase, [])]),
            reserved_bytes=self._most_reserved(),
        )
        for phase in Phase:
            readings |= known(
                **{f"phases.{phase}.peak_bytes": highest(self._peaks.get(phase, [])), f"phases.{phase}.end_bytes": self._ends.get(phase)}
            )
        notes = ["of rank 0, up to the last of these lines"]
        if self._allocated is None:
            notes.append("no line after a step: memory allocated between steps is not known")
        return Finding(self.format, readings, notes=tuple(f"{self.format}: {note}" for note in notes))

    def _interval(self, instant: re.Match[str] | None, allocated: Reading, peak: Reading) -> None:
        """Give the time since the last line to the phase that was open, or that this line ends."""
        place, phase = (instant[1].lower(), Phase(instant[2].lower())) if instant else ("", self._open)
        ends = phase if place == "after" else self._open
        mixed = self._open is Phase.INIT and ends is not Phase.INIT  # the first line after init is one after a phase: both are in its peak
        if ends is not None and not mixed:
            self._peaks.setdefault(ends, []).append(peak)
            self._ends[ends] = allocated
        self._open = phase
        if place == "after" and phase is Phase.STEP:
            self._allocated, self._open = allocated, None

    def _most_reserved(self) -> Reading | None:
        most, now = highest(self._reserved_peaks), highest(self._reserved)
        return most.at_least(now) if most and now else None
