"""Losses and the price in learning, where there is more to say than the summary's first and last
loss."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bf16prof.reports.casts_table import casts_table
from bf16prof.reports.cells import Table
from bf16prof.reports.console.layout import Column, heading, note, table
from bf16prof.reports.loss_table import loss_notes, loss_table
from bf16prof.reports.losses import loss_gaps, seed_groups
from bf16prof.reports.price_table import price_table
from bf16prof.reports.views import CaseView, run_views
from bf16prof.runs import Run

_LEFT = ("case", "to", "values")


def learning(runs: Sequence[Run], console: Console) -> None:
    """Print what several runs, or cases, say of learning."""
    views = run_views(runs)
    losses_in_numbers(views, console)
    price_in_learning(views, console)


def losses_in_numbers(views: Sequence[CaseView], console: Console) -> None:
    """Print one row per case with its statistics: where there are several seeds, a gap between
    cases, a loss that was not finite, or statistics that were published; nothing else, as the
    summary says the losses."""
    groups = seed_groups(views)
    lost = any(found.lost for group in groups for found in group.statistics)
    told = lost or any(len(group.views) > 1 for group in groups) or any(view.main.loss_summary for view in views) or loss_gaps(groups)
    found = loss_table(views) if told else None
    if found is None:
        return
    _print(found, console)
    for text in loss_notes(views):
        note(console, f"{text}.")


def price_in_learning(views: Sequence[CaseView], console: Console) -> None:
    """Print one row per case whose updates were watched, and of each what casts would have made of
    its values."""
    if found := price_table(views):
        _print(found, console)
    for view in views:
        if found := casts_table(view.main):
            _print(found, console)


def _print(found: Table, console: Console) -> None:
    title, mark, how = found.caption.partition(": ")
    heading(console, title)
    columns = [Column(header, "left" if header in _LEFT else "right", key=header == "case") for header in found.headers]
    table(console, columns, [[Text(cell.text, "red" if "bad" in cell.style else "") for cell in row] for row in found.rows])
    if mark:
        note(console, f"{how[0].upper()}{how[1:]}.")
