"""DeepSpeed's timers (`wall_clock_breakdown` in its JSON): one line per micro-step and, after each optimizer step, one of the whole:

    [Rank 0] time (ms) | fwd: 181.20 | bwd: 353.61 | bwd_inner: 353.55 | bwd_allreduce: 0.01 | step: 65.90

from `SynchronizedWallClockTimer.log` (deepspeed/utils/timer.py) and `DeepSpeedEngine.step`. Versions before 0.10 spell the names out.
"""

from __future__ import annotations

import re
import statistics

from bf16prof.imports.finding import NUMBER, Finding
from bf16prof.records import StepRecord

_LINE = re.compile(rf"\btime \(ms\)((?: \| [\w./-]{{1,60}}: {NUMBER})+)")
_TIMER = re.compile(rf"([\w./-]+): ({NUMBER})")
_PARTS = {"fwd": "forward", "forward": "forward", "bwd": "backward", "backward": "backward", "step": "step"}


class TimersReader:
    """Reads the lines of one rank; those of whole steps count."""

    format = "DeepSpeed's wall-clock timers"

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []

    def line(self, text: str) -> int:
        """Read one line."""
        found = _LINE.search(text)
        if found is None:
            return 0
        times = {_PARTS[name]: float(ms) / 1e3 for name, ms in _TIMER.findall(found[1]) if name in _PARTS}
        if len(times) == 3:
            self._steps.append(times)
        return 1

    def finding(self) -> Finding | None:
        """The steps in the order of their lines."""
        if not self._steps:
            return None
        steps = tuple(StepRecord(n, None, sum(times.values()), None) for n, times in enumerate(self._steps))
        medians = ", ".join(f"{part} {statistics.median(t[part] for t in self._steps) * 1e3:.2f} ms" for part in self._steps[0])
        notes = (
            f"{self.format}: medians of {len(steps)} steps: {medians}",
            f"{self.format}: a step is their sum; what the script does between them is not in it",
        )
        return Finding(self.format, steps=steps, notes=notes)
