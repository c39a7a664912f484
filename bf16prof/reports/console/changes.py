"""Which changes of a job give memory back, in a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bf16prof.plans import Change
from bf16prof.reports.console.layout import Column, heading, note, table
from bf16prof.reports.units import gib, inert

_COLUMNS = (Column("change", "left", key=True), Column("saves"), Column("peak"), Column("flag", "left"))
MOST = 5
SMALLEST = 0.01
"""A change that saves less than this share of the peak is not worth a line."""


def changes_view(changes: Sequence[Change], peak_bytes: int, console: Console) -> None:
    """Print the single changes that save most, the largest first; nothing where none saves enough."""
    worth = sorted((c for c in changes if c.saved_bytes >= peak_bytes * SMALLEST), key=lambda c: -c.saved_bytes)
    if not worth:
        return
    heading(console, "What gives memory back, by the closed form")
    rows: list[list[Text | str]] = [[inert(c.what, 60), gib(c.saved_bytes), gib(c.plan.peak_bytes), inert(c.flag, 120)] for c in worth[:MOST]]
    table(console, _COLUMNS, rows)
    note(console, f"Each alone; {len(worth)} save at least {SMALLEST:.0%} of the peak.")
