"""The table of the losses: by case, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.reports.cells import Cell, Table, unknown_cell, without_empty
from bf16prof.reports.intervals import CONFIDENCE, Interval
from bf16prof.reports.losses import LossGap, SeedGroup, loss_gaps, seed_groups, seed_of
from bf16prof.reports.views import CaseView

_COLUMNS = {"final": "final", "mean": "mean", "deviation": "standard deviation", "tail": "running mean at the end"}


def loss_table(views: Sequence[CaseView]) -> Table | None:
    """One row per case that has losses: its seeds, and each statistic, with an interval where there are several."""
    groups = [group for group in seed_groups(views) if group.statistics]
    if not groups:
        return None
    gaps = {gap.group.indices: gap for gap in loss_gaps(groups)}
    headers = ("case", "seeds", "steps", *_COLUMNS.values(), "gap at the end", "to")
    return without_empty(
        Table(_title(groups, list(gaps.values())), headers, tuple(_row(group, gaps.get(group.indices)) for group in groups))
    )


def _title(groups: Sequence[SeedGroup], gaps: Sequence[LossGap]) -> str:
    several = any(len(group.views) > 1 for group in groups)
    over = f"; ± is the {CONFIDENCE:.0%} interval over seeds by Student's t" if several else ""
    paired = ", of a gap that of the differences seed by seed" if several and gaps else ""
    return f"Losses. The running mean is over the last tenth of the steps{over}{paired}"


def _row(group: SeedGroup, gap: LossGap | None) -> tuple[Cell, ...]:
    seeds = [seed_of(view.profile) for view in group.views]
    steps = sorted({found.steps for found in group.statistics})
    return (
        Cell(group.label),
        unknown_cell() if None in seeds else Cell(", ".join(map(str, seeds)), style="number"),
        Cell(" or ".join(map(str, steps)), steps[-1], "number"),
        *(_interval(group.interval(quantity)) for quantity in _COLUMNS),
        _interval(gap.gap if gap else None, signed=True),
        Cell(gap.reference.label) if gap else unknown_cell(),
    )


def _interval(found: Interval | None, *, signed: bool = False) -> Cell:
    if found is None:
        return unknown_cell()
    return Cell(("+" if signed and found.mean > 0 else "") + found.text(4), found.mean, "number")
