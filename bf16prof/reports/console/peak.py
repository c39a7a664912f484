"""What is alive at the training peak, by component and by name, and whether the job has room on its
GPU."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from bf16prof.records import MemoryRecord
from bf16prof.reports.console.layout import Column, heading, mark, table
from bf16prof.reports.palette import CONSOLE
from bf16prof.reports.units import gib, inert, share, whole
from bf16prof.reports.verdict import Said
from bf16prof.reports.views import PEAK_ITEMS, component_name, largest
from bf16prof.vocabulary import Component

_COMPONENTS = (Column("component", "left", key=True), Column("between steps"), Column("at the peak"), Column("bytes"), Column("share"))
_ITEMS = (Column("largest", "left", key=True), Column("component", "left"), Column("size"), Column("bytes"), Column("share"))


def training_peak(record: MemoryRecord, console: Console) -> None:
    """Print what a record knows of the moment of its training peak: a table by component, then the
    largest tensors by name."""
    peak_components(record, console)
    if record.peak_items:
        table(console, _ITEMS, _item_rows(record))


def holders(record: MemoryRecord, console: Console, most: int = 6) -> None:
    """Print the largest tensors that are alive at the training peak, in a table that is narrow."""
    shown, rest = largest(record.peak_items, most)
    if not shown:
        return
    heading(console, "Who holds it")
    total = sum(item.bytes for item in record.peak_items)
    rows: list[list[Text | str]] = [
        [inert(item.name, 44), component_name(item.component), gib(item.bytes), share(item.bytes, total)] for item in shown
    ]
    if rest:
        size = sum(item.bytes for item in rest)
        rows.append([f"({len(rest)} smaller ones)", "", gib(size), share(size, total)])
    table(console, (Column("tensor", "left", key=True), Column("component", "left"), Column("size"), Column("share")), rows)


def peak_components(record: MemoryRecord, console: Console) -> None:
    """Print the table by component only."""
    if record.peak_components:
        phase = f" ({record.peak_phase})" if record.peak_phase else ""
        heading(console, f"At the training peak{phase}")
        table(console, _COMPONENTS, _component_rows(record))


def verdict_line(said: Said, console: Console) -> None:
    """Print whether a job has room, in words and with a mark; the colour only repeats it."""
    console.print(Text(f"{mark(console, said.style)} {said.text}", CONSOLE[said.style]))


def _component_rows(record: MemoryRecord) -> list[list[Text | str]]:
    used = [c for c in Component if record.peak_components.get(c) or record.components.get(c)]
    rows = []
    for component in sorted(used, key=lambda c: -record.peak_components.get(c, 0)):
        between = record.components.get(component, 0) if record.components else None
        rows.append(_row(component_name(component), gib(between), record.peak_components.get(component, 0), record))
    return [*rows, _row("allocated", gib(record.allocated_bytes), sum(record.peak_components.values()), record, "bold")]


def _item_rows(record: MemoryRecord) -> list[list[Text | str]]:
    shown, rest = largest(record.peak_items, PEAK_ITEMS)
    rows = [_row(inert(item.name), component_name(item.component), item.bytes, record) for item in shown]
    if rest:
        rows.append(_row(f"({len(rest)} smaller ones)", "", sum(item.bytes for item in rest), record))
    return rows


def _row(name: str, second: str, size: int, record: MemoryRecord, style: str = "") -> list[Text | str]:
    total = sum(record.peak_components.values())
    return [Text(text, style) for text in (name, second, gib(size), whole(size), share(size, total))]
