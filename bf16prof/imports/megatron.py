"""What Megatron-DeepSpeed prints of its iterations, and once of its memory (megatron's
`training_log` and `report_memory`):

     iteration       10/  500000 | elapsed time per iteration (ms): 1234.5 | ... | lm loss: 1.03E+01
    [Rank 3] (after 10 iterations) memory (MB) | allocated: 18123.45 | max allocated: 25000.12 | ...

Its MB are 2**20 bytes; the peaks are torch's own counters, since the process began unless somebody
has reset them.
"""

from __future__ import annotations

import math
import re

from bf16prof.imports.finding import MIB, NUMBER, Finding, Reading, rounded
from bf16prof.step_records import StepRecord
from bf16prof.summaries import not_finite

_ITERATION = re.compile(r"\biteration +(\d{1,12})/ *\d{1,12} \|")
_TIME = re.compile(rf"\| elapsed time per iteration \((ms|s)\): ({NUMBER}) \|")
_LOSS = re.compile(r"\| (?:lm )?loss: (-?\d{1,9}(?:\.\d{1,15})?(?:E[+-]?\d{1,3})?|nan|inf)\b", re.IGNORECASE)
_MEMORY = re.compile(
    rf"\[Rank (\d{{1,7}})\] .{{0,80}}memory \(MB\) \| allocated: ({NUMBER}) \| max allocated: ({NUMBER}) \| reserved: {NUMBER} "
    rf"\| max reserved: ({NUMBER})"
)


class MegatronReader:
    """Reads iterations, and the memory of all ranks that print it."""

    format = "Megatron-DeepSpeed"
    marks = ("memory (mb) |", "iteration ")

    def __init__(self) -> None:
        self._steps: dict[int, StepRecord] = {}
        self._ranks: dict[int, dict[str, Reading]] = {}

    def line(self, text: str) -> int:
        """Read one line."""
        if found := _MEMORY.search(text):
            names = ("allocated_bytes", "run_peak_allocated_bytes", "reserved_bytes")
            self._ranks[int(found[1])] = {
                name: rounded(size, MIB, len(size.partition(".")[2])) for name, size in zip(names, found.groups()[1:], strict=True)
            }
            return 1
        if found := _ITERATION.search(text):
            self._iteration(int(found[1]), text)
            return 1
        return 0

    def finding(self) -> Finding | None:
        """The steps, and the memory of the rank with the highest peak."""
        if not (self._steps or self._ranks):
            return None
        steps = tuple(self._steps[step] for step in sorted(self._steps))
        notes = not_finite([step.step for step in steps if step.loss_not_finite], len(steps))
        worst = max(self._ranks, key=lambda rank: self._ranks[rank]["run_peak_allocated_bytes"].bytes, default=None)
        if worst is None:
            return Finding(self.format, steps=steps, notes=tuple(f"{self.format}: {note}" for note in notes))
        of = f", which holds most of {len(self._ranks)}" if len(self._ranks) > 1 else ""
        notes.append(f"memory of rank {worst}{of}")
        told = tuple(f"{self.format}: {note}" for note in notes)
        return Finding(self.format, self._ranks[worst], steps=steps, notes=told, ranks=max(self._ranks) + 1)

    def _iteration(self, number: int, text: str) -> None:
        time, loss = _TIME.search(text), _LOSS.search(text)
        seconds = float(time[2]) / (1e3 if time[1] == "ms" else 1) if time else None
        value = float(loss[1]) if loss else None
        is_lost = value is not None and not math.isfinite(value)
        self._steps[number] = StepRecord(number, None if is_lost else value, seconds, None, loss_not_finite=is_lost)
