"""DeepSpeed's pipeline engine (deepspeed/runtime/pipe/engine.py, `train_batch`), which prints every
`steps_per_print` steps on rank 0:

    steps: 20 loss: 5.1234 iter time (s): 0.312 samples/sec: 102.564

The time is a mean over the steps since the last such line.
"""

from __future__ import annotations

import math
import re

from bf16prof.imports.finding import NUMBER, Finding
from bf16prof.step_records import StepRecord
from bf16prof.summaries import not_finite

_LINE = re.compile(rf"\bsteps: (\d{{1,12}}) loss: (-?{NUMBER}|nan|inf) .{{0,400}}?iter time \(s\): ({NUMBER}) samples/sec: ")


class PipelineReader:
    """Reads the lines of rank 0."""

    format = "DeepSpeed's pipeline engine"
    marks = ("iter time (s):",)

    def __init__(self) -> None:
        self._steps: dict[int, StepRecord] = {}

    def line(self, text: str) -> int:
        """Read one line."""
        found = _LINE.search(text)
        if found is None:
            return 0
        loss = float(found[2])
        is_lost = not math.isfinite(loss)
        step = int(found[1])
        self._steps[step] = StepRecord(step, None if is_lost else loss, float(found[3]), None, loss_not_finite=is_lost)
        return 1

    def finding(self) -> Finding | None:
        """The steps that were printed."""
        if not self._steps:
            return None
        steps = tuple(self._steps[step] for step in sorted(self._steps))
        notes = not_finite([step.step for step in steps if step.loss_not_finite], len(steps))
        return Finding(self.format, steps=steps, notes=tuple(f"{self.format}: {note}" for note in notes))
