"""The map of a grid in characters: for each recipe GPUs across, ZeRO stages down, and in each cell
what is left in GiB."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bf16prof.reports.console.layout import heading, mark, note
from bf16prof.reports.fit_map import FitMap, MapCell
from bf16prof.reports.palette import CONSOLE
from bf16prof.reports.verdict import Style

_MEANING: tuple[tuple[Style, str], ...] = (
    ("good", "fits"),
    ("warn", "tight: the bytes fit, the allocator's share may not"),
    ("bad", "does not fit"),
)


def fit_map_view(maps: Sequence[FitMap], console: Console) -> None:
    """Print the maps, one under the other, and what their cells mean."""
    for found in maps:
        heading(console, Text(found.title))
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0, header_style="bold")
        grid.add_column(found.corner, justify="right")
        for name in found.columns:
            grid.add_column(name, justify="right", no_wrap=True)
        for name, cells in found.rows:
            grid.add_row(name, *(_cell(cell, console) for cell in cells))
        console.print(grid)
    symbols = [f"{mark(console, style)} {words}" for style, words in _MEANING]
    note(console, f"GPUs across; GiB left of what the allocator may hold, negative: what lacks. {', '.join(symbols)}. -v has all numbers.")


def _cell(cell: MapCell | None, console: Console) -> Text:
    if cell is None:
        return Text(".", "dim")
    return Text(f"{mark(console, cell.style)}{cell.text}", CONSOLE[cell.style])
