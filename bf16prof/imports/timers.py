"""DeepSpeed's timers (`wall_clock_breakdown` in its JSON): one line per micro-step and, after each
optimizer step, one of the whole:

    time (ms) | fwd_microstep: 90.60 | bwd_microstep: 176.80 | ... | step_microstep: 0.03
    [Rank 0] time (ms) | fwd: 181.20 | bwd: 353.61 | ... | bwd_allreduce: 0.01 | step: 65.90

from `SynchronizedWallClockTimer.log` (deepspeed/utils/timer.py) and `DeepSpeedEngine.step`.
Versions before 0.10 spell the names out, and say `rank=0` in front. Where only lines of micro-steps
were kept, a step is as many of them as there are in a step, if that is known.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from bf16prof.imports.finding import NUMBER, Finding, Rates
from bf16prof.step_records import StepRecord

_LINE = re.compile(rf"\btime \(ms\)((?: \| [\w./-]{{1,60}}: {NUMBER})+)")
_TIMER = re.compile(rf"([\w./-]+): ({NUMBER})")
_PARTS = {"fwd": "forward", "forward": "forward", "bwd": "backward", "backward": "backward", "step": "step"}
_MICRO = "_microstep"


class TimersReader:
    """Reads the lines of one rank; those of whole steps count, where there are any."""

    format = "DeepSpeed's wall-clock timers"
    marks = ("time (ms) |",)

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []
        self._micro_steps: list[dict[str, float]] = []

    def line(self, text: str) -> int:
        """Read one line."""
        found = _LINE.search(text)
        if found is None:
            return 0
        timers = [(name, float(ms) / 1e3) for name, ms in _TIMER.findall(found[1])]
        for suffix, kept in (("", self._steps), (_MICRO, self._micro_steps)):
            times = {_PARTS[part]: s for name, s in timers if name.endswith(suffix) and (part := name.removesuffix(suffix)) in _PARTS}
            if len(times) == len(set(_PARTS.values())):
                kept.append(times)
        return 1

    def finding(self) -> Finding | None:
        """The steps in the order of their lines."""
        if self._steps:
            steps = tuple(StepRecord(n, None, sum(times.values()), None) for n, times in enumerate(self._steps))
            return Finding(self.format, steps=steps, notes=self._notes(self._steps, "step"))
        if self._micro_steps:
            rates = Rates(micro_step_s=tuple(sum(times.values()) for times in self._micro_steps))
            return Finding(self.format, notes=self._notes(self._micro_steps, "micro-step"), rates=rates)
        return None

    def _notes(self, found: Sequence[dict[str, float]], what: str) -> tuple[str, ...]:
        medians = ", ".join(f"{part} {statistics.median(times[part] for times in found) * 1e3:.2f} ms" for part in found[0])
        return (
            f"{self.format}: medians of {len(found)} {what}s: {medians}",
            f"{self.format}: a {what} is their sum; what the script does between them is not in it",
        )
