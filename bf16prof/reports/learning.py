"""What records say of a recipe's price in learning: means over the steps in which updates were
watched."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.records import MemoryRecord
from bf16prof.reports.units import number


@dataclass(frozen=True)
class Learning:
    """Over `steps` watched steps: the mean share of lost updates, the mean effective descent
    quality, and the last loss."""

    steps: int
    lost_updates: float | None
    edq: float | None
    loss: float | None

    @property
    def text(self) -> str:
        """One line: `EDQ 0.9601, 24.65 % of updates lost, loss 4.594 (3 steps)`."""
        steps = f"({self.steps} step{'s' * (self.steps != 1)})"
        if self.edq is None or self.lost_updates is None:
            return f"no finite update was intended {steps}"
        loss = "" if self.loss is None else f", loss {number(self.loss)}"
        return f"EDQ {edq_text(self.edq)}, {lost_text(self.lost_updates)} of updates lost{loss} {steps}"


def learning(record: MemoryRecord) -> Learning | None:
    """The means of one record; `None` where updates were not watched."""
    if not record.quality:
        return None
    lost = [step.total.lost_updates for step in record.quality if step.total.lost_updates is not None]
    edq = [step.total.edq for step in record.quality if step.total.edq is not None]
    return Learning(
        len(record.quality),
        statistics.fmean(lost) if lost else None,
        statistics.fmean(edq) if edq else None,
        record.quality[-1].loss,
    )


def of_recipe(records: Sequence[MemoryRecord], recipe: str) -> list[tuple[MemoryRecord, Learning]]:
    """The records of a recipe that know what it costs."""
    return [(record, found) for record in records if record.case.recipe == recipe and (found := learning(record))]


def lost_text(share: float | None) -> str:
    """A share of lost updates as text; empty where it is not known."""
    return "" if share is None else f"{100 * share:.2f} %"


def edq_text(edq: float | None) -> str:
    """An effective descent quality as text; empty where it is not known."""
    return "" if edq is None else f"{edq:.4f}"
