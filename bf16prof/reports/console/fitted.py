"""One table that is never split: where there is no room for all columns, those that a reader misses
least go first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from bf16prof.reports.units import UNKNOWN


@dataclass(frozen=True)
class Fitted:
    """A column. `drop`: how early it goes where there is no room, the highest first; 0: never."""

    header: str
    drop: int = 0
    justify: Literal["left", "right"] = "right"


def fitted(columns: Sequence[Fitted], rows: Sequence[Sequence[Text]], width: int) -> Table:
    """The table of those columns that say something and have room. The first may fold."""
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i].plain not in ("", UNKNOWN) for row in rows)]
    while _width(columns, rows, kept) > width and any(columns[i].drop for i in kept):
        kept.remove(max(kept, key=lambda i: columns[i].drop))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0, header_style="bold")
    for i in kept:
        grid.add_column(columns[i].header, justify=columns[i].justify, overflow="fold", no_wrap=i > 0, vertical="bottom")
    for row in rows:
        grid.add_row(*(row[i] for i in kept))
    return grid


def _width(columns: Sequence[Fitted], rows: Sequence[Sequence[Text]], kept: Sequence[int]) -> int:
    widths = (max(*map(cell_len, columns[i].header.split("\n")), *(row[i].cell_len for row in rows)) for i in kept)
    return sum(widths) + len(kept) - 1
