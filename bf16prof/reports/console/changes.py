"""Which changes of a job give memory back, in a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bf16prof.plans import Change
from bf16prof.reports.console.layout import heading, note
from bf16prof.reports.units import gib, inert

MOST = 5
SMALLEST = 0.01
"""A change that saves less than this share of the peak is not worth a line."""


def changes_view(changes: Sequence[Change], console: Console) -> None:
    """Print the single changes that save most, the largest first; nothing where none saves
    enough."""
    worth = sorted((c for c in changes if c.saved_bytes >= (c.plan.peak_bytes + c.saved_bytes) * SMALLEST), key=lambda c: -c.saved_bytes)
    if not worth:
        return
    heading(console, "What gives memory back, by the closed form: saved, the peak then, what to type")
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("right", "right", "left"):
        grid.add_column(justify=justify, overflow="fold", no_wrap=justify == "right")
    for change in worth[:MOST]:
        grid.add_row(gib(change.saved_bytes), gib(change.plan.peak_bytes), Text(inert(change.flag, 200)))
    console.print(grid)
    note(console, f"Each alone; {len(worth)} save at least {SMALLEST:.0%} of the peak.")
