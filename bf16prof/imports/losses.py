"""A CSV file of losses with the columns `step` and `loss`, as the example's `--loss_log_file`
writes it (rank 0)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable

from bf16prof.imports.finding import Finding
from bf16prof.step_records import StepRecord
from bf16prof.summaries import not_finite

COLUMNS = ("step", "loss")


class LossReader:
    """Reads rows of step and loss."""

    format = "CSV of losses"

    def __init__(self) -> None:
        self._losses: dict[int, float | None] = {}
        self._notes: list[str] = []

    def rows(self, lines: Iterable[str], *, is_cut: bool = False) -> tuple[int, int]:
        """Read a file, its header first; how many rows were understood, and how many were not.

        `is_cut`: the last line does not end, so that its loss may have had more digits.
        Raises `ValueError` when a step comes twice: these are then several runs.
        """
        rows = csv.reader(lines)
        header = [cell.strip() for cell in next(rows)]
        places = [header.index(name) for name in COLUMNS]
        good = bad = 0
        for row in rows:
            step, loss = (row[place].strip() if place < len(row) else "" for place in places)
            if not (step.isascii() and step.isdecimal() and len(step) <= 12 and _is_number(loss)):
                bad += bool(row)
                continue
            if int(step) in self._losses:
                raise ValueError(f"step {int(step)} is there twice: these are the losses of several runs")
            self._losses[int(step)] = float(loss) if math.isfinite(float(loss)) else None
            good += 1
        if is_cut and good:
            self._notes.append("the last line of the losses does not end: its number may have been cut")
        return good, bad

    def finding(self) -> Finding | None:
        """The steps with their losses."""
        if not self._losses:
            return None
        curve = sorted(self._losses.items())
        steps = tuple(StepRecord(step, loss, None, None, loss_not_finite=loss is None) for step, loss in curve)
        return Finding(self.format, steps=steps, notes=(*not_finite([s.step for s in steps if s.loss is None], len(steps)), *self._notes))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return len(text) <= 40
