"""Tables of the reports: cells that say what is read and what they sort by."""

from __future__ import annotations

from dataclasses import dataclass

from bf16prof.records import MemoryRecord
from bf16prof.reports.intervals import Interval
from bf16prof.reports.units import AS_PRINTED, AT_LEAST, CONSISTENT, EXACT, gib, number, signed_bytes, signed_percent, whole
from bf16prof.reports.views import Line
from bf16prof.vocabulary import Source


@dataclass(frozen=True)
class Cell:
    """A cell: what is read, what it sorts by (the text where there is none), its class, and a link
    or a component's colour.

    `detail`: lines below the text that explain it. `keys`: of a row's first cell, (name, value) by
    which the page filters the row.
    """

    text: str
    value: float | None = None
    style: str = ""
    link: str = ""
    colour: str = ""
    title: str = ""
    detail: str = ""
    keys: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """A table; in HTML it sorts by a click on a header."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def unknown_cell() -> Cell:
    """What stands where no source knows a value."""
    return Cell("–", style="unknown", title="not known by this source")  # noqa: RUF001


def bytes_cell(value: int | None, *, title: str = "", detail: str = "", at_least: bool = False) -> Cell:
    """Bytes for a person, with the exact number as its tooltip; a lower bound is shown as such."""
    if value is None:
        return unknown_cell()
    mark = AT_LEAST if at_least else ""
    return Cell(mark + gib(value), value, "number", title=f"{mark}{whole(value)} B" + (f", {title}" if title else ""), detail=detail)


def total_cell(record: MemoryRecord, quantity: str, *, title: str = "") -> Cell:
    """A total of a record."""
    return bytes_cell(getattr(record, quantity), title=title, at_least=quantity in record.at_least)


def number_cell(value: float | None) -> Cell:
    """A number for a person."""
    return unknown_cell() if value is None else Cell(number(value), value, "number")


def interval_cell(found: Interval | None, digits: int = 4, *, signed: bool = False) -> Cell:
    """A mean with its interval; a difference with its sign."""
    if found is None:
        return unknown_cell()
    return Cell(("+" if signed and round(found.mean, digits) > 0 else "") + found.text(digits), found.mean, "number")


def difference_cell(line: Line | None, source: Source) -> Cell:
    """By how much a prediction misses the reference."""
    if line is not None and source in line.consistent:
        return Cell(CONSISTENT, 0, "number good", title="not below what the log proves")
    if line is None or source not in line.differences:
        return unknown_cell()
    difference, error = line.differences[source], line.errors.get(source)
    style = f"number {error_style(line, source)}"
    if line.kind == "time":
        return Cell(signed_percent(error), error, style)
    if difference == 0:
        return Cell(EXACT, 0, "number good", title="0 B")
    if line.as_printed(source):
        return Cell(AS_PRINTED, 0, "number good", title=f"{difference:+,} B of ± {line.rounding:,} B that rounding leaves open")
    text = signed_bytes(difference) if error is None else f"{signed_bytes(difference)} ({signed_percent(error)})"
    return Cell(text, difference if error is None else error, style, title=f"{difference:+,} B")


def error_style(line: Line, source: Source) -> str:
    """How good a prediction is: good up to 1 %, bad beyond 5 %."""
    error = line.errors.get(source)
    if error is None:
        return "warn"
    return "good" if abs(error) <= 0.01 else "warn" if abs(error) <= 0.05 else "bad"


def without_empty(table: Table) -> Table:
    """The table without the columns that no row knows."""
    kept = [i for i in range(len(table.headers)) if any(row[i].style != "unknown" for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.caption, tuple(table.headers[i] for i in kept), rows)
