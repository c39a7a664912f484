"""Losses over seeds, where a case was trained with several."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bf16prof.reports.console.layout import Column, heading, note, table
from bf16prof.reports.loss_table import loss_table
from bf16prof.reports.losses import seed_groups
from bf16prof.reports.views import CaseView


def losses_over_seeds(views: Sequence[CaseView], console: Console) -> None:
    """Print one row per case with its intervals; nothing where every case has one seed, whose losses the summary says."""
    found = loss_table(views) if any(len(group.views) > 1 for group in seed_groups(views)) else None
    if found is None:
        return
    title, _, how = found.caption.partition(". ")
    heading(console, title)
    columns = [Column(header, "left" if header in ("case", "to") else "right", key=header == "case") for header in found.headers]
    table(console, columns, [[Text(cell.text) for cell in row] for row in found.rows])
    note(console, f"{how}.")
