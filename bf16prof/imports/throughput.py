"""DeepSpeed's throughput timer (deepspeed/utils/timer.py, `ThroughputTimer.stop`), which prints
every `steps_per_print` steps on rank 0:

    epoch=0/micro_step=40/global_step=20, ..., MemAllocated=5.18GB, MaxMemAllocated=21.4GB

without any switch. Its GB are 2**30 bytes rounded to two decimals (`round(x, 2)`, so 21.4 is
21.40). It is called at the end of `engine.step`: what is allocated then is what is allocated
between steps, and the peak is `max_memory_allocated`, since the process began unless somebody has
reset it. Before 0.8 the line begins with `0/20`, before 0.6.2 it has one rate.
"""

from __future__ import annotations

import math
import re

from bf16prof.imports.finding import GIB, NUMBER, Finding, Rates, Reading, highest, known, rounded

_WORDS = r"[\d.]{1,30}(?:e[+-]?\d{1,3})?"
_LINE = re.compile(
    rf"\b(?:epoch=\d{{1,9}}/micro_step=\d{{1,12}}/global_step=(\d{{1,12}})|\d{{1,9}}/(\d{{1,12}})), "
    rf"(?:RunningAvg)?SamplesPerSec=(-?(?:inf|{_WORDS}))(?:, CurrSamplesPerSec=({_WORDS}))?, "
    rf"MemAllocated=({NUMBER})GB, MaxMemAllocated=({NUMBER})GB"
)


class ThroughputReader:
    """Reads the lines of one rank."""

    format = "DeepSpeed's throughput timer"
    marks = ("maxmemallocated=",)

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}
        self._allocated: Reading | None = None
        self._peaks: list[Reading] = []
        self._step = 0

    def line(self, text: str) -> int:
        """Read one line."""
        found = _LINE.search(text)
        if found is None:
            return 0
        step = int(found[1] or found[2])
        if found[4] is not None and (rate := _number(found[4])) > 0:
            self._rates[step] = rate
        self._allocated = rounded(found[5], GIB, 2)
        self._peaks.append(rounded(found[6], GIB, 2))
        self._step = step
        return 1

    def finding(self) -> Finding | None:
        """What the last line says is allocated, and the highest of the peaks."""
        peak = highest(self._peaks)
        if peak is None or self._allocated is None:
            return None
        notes = [f"rank 0, up to step {self._step}: the peak is that of the process until then"]
        readings = known(allocated_bytes=self._allocated, run_peak_allocated_bytes=peak)
        if peak.low == 0:  # there is no accelerator, or it does not say
            notes, readings = ["no GPU memory is said"], {}
        rates = Rates(samples_per_s=self._rates)
        return Finding(self.format, readings, notes=tuple(f"{self.format}: {note}" for note in notes), rates=rates)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
