"""The console itself, and the one way in which all tables are laid out on it.

A table that is wider than the console folds its last column, if that has words and room for some of
them; else it is split into several, one under the other, each with the key columns repeated.
Nothing is cut off, neither in a narrow terminal nor in a pipe.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bf16prof.reports.palette import SYMBOLS
from bf16prof.reports.units import inert

PIPE_WIDTH = 10_000
"""Columns of a console that is not a terminal: wide enough for every table to be complete."""

_NARROWEST = 20
_FEWEST_LETTERS = 20
"""A column of words is not folded to fewer."""
_GAP = 2


@dataclass(frozen=True)
class Column:
    """A column of a table. Key columns are repeated when the table is split, and folded where they
    are long."""

    header: str
    justify: Literal["left", "right"] = "right"
    key: bool = False


def make_console(stderr: bool = False) -> Console:
    """A console on stdout or stderr. A terminal or COLUMNS limits its width; a pipe is as wide as
    the tables need.

    NO_COLOR and FORCE_COLOR are rich's own. A character that the stream cannot encode is printed as
    `?` instead of ending the program.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
        stream.reconfigure(errors="replace")
    columns = os.environ.get("COLUMNS", "")
    width = max(_NARROWEST, int(columns)) if columns.isdecimal() and int(columns) else None
    if width is None and not stream.isatty():
        width = PIPE_WIDTH
    height = None if width is None else 25  # rich ignores the width of a dumb terminal unless both are given
    return Console(stderr=stderr, width=width, height=height, highlight=False, emoji=False)


def in_text(show: Callable[[Console], None]) -> str:
    """What `show` prints, as text of 80 columns without colours."""
    stream = io.StringIO()
    show(Console(file=stream, width=80, height=25, color_system=None, highlight=False, emoji=False))
    return stream.getvalue().rstrip("\n")


def safe(value: object, style: str = "", limit: int | None = None) -> Text:
    """A name or message as text that no markup, escape sequence or newline in it can change."""
    return Text(inert(value) if limit is None else inert(value, limit), style=style)


def heading(console: Console, title: Text | str) -> None:
    """A line that opens a block of output."""
    console.print()
    text = Text(title) if isinstance(title, str) else title
    text.stylize("bold")
    console.print(text)


def note(console: Console, text: str) -> None:
    """A caption: dim, folded at the width of the console."""
    console.print(Text(text, style="dim"))


def mark(console: Console, name: Literal["good", "warn", "bad"]) -> str:
    """A symbol for a verdict, so that colour is never the only sign; ASCII where the stream cannot
    encode the nicer one."""
    plain = {"good": "+", "warn": "!", "bad": "x"}
    return (SYMBOLS if console.encoding.lower().startswith("utf") else plain)[name]


def table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[Text | str]]) -> None:
    """Print a table, in as many parts as the width of the console needs. Key columns come first."""
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = [_natural(column.header, [row[i] for row in cells]) for i, column in enumerate(columns)]
    keys = [i for i, column in enumerate(columns) if column.key]
    words = [_longest_word(columns[i].header, [row[i] for row in cells]) + _GAP for i in keys]
    room, parts = _split(console.width, widths, keys, sum(words))
    folded = len(parts) > 1 and _is_foldable(console.width, columns, widths)
    if folded:
        parts = [[i for i in range(len(columns)) if i not in keys]]

    def is_whole(i: int) -> bool:
        return i < len(columns) - 1 if folded else i not in keys and widths[i] <= room

    for part in parts:
        chosen = [*keys, *part]
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for i in chosen:
            grid.add_column(Text(columns[i].header), justify=columns[i].justify, overflow="fold", no_wrap=is_whole(i))
        for row in cells:
            grid.add_row(*(row[i] for i in chosen))
        console.print(grid)


def _is_foldable(width: int, columns: Sequence[Column], widths: Sequence[int]) -> bool:
    """Whether the other columns leave the last one, if it has words, room for some."""
    left = width - sum(widths[:-1]) - _GAP * len(widths)
    return columns[-1].justify == "left" and not columns[-1].key and left >= _FEWEST_LETTERS


def _natural(header: str, cells: Sequence[Text]) -> int:
    texts = [Text(header), *cells]
    return max(line.cell_len for text in texts for line in text.split("\n", allow_blank=True))


def _longest_word(header: str, cells: Sequence[Text]) -> int:
    return max((cell_len(word) for text in [header, *(cell.plain for cell in cells)] for word in text.split()), default=0)


def _split(width: int, widths: Sequence[int], keys: Sequence[int], floor: int) -> tuple[int, list[list[int]]]:
    """The columns left beside the keys, and the value columns in groups that fit there. Keys fold
    between words, below `floor` within."""
    room = width - min(floor, width // 2)
    parts: list[list[int]] = [[]]
    used = 0
    for i in (i for i in range(len(widths)) if i not in keys):
        if parts[-1] and used + widths[i] + _GAP > room:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += widths[i] + _GAP
    return room, parts
