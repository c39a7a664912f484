"""One case in detail: a row per quantity, a column per source, and the difference of each
prediction."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from bf16prof.reports.console.layout import Column, table
from bf16prof.reports.units import AS_PRINTED, CONSISTENT, EXACT, signed_bytes, signed_percent
from bf16prof.reports.views import CaseView, Line, value_text
from bf16prof.vocabulary import Source


def quantities(view: CaseView, console: Console, *, logged_only: bool = False) -> None:
    """Print every quantity of a case by source, with what each prediction misses. `logged_only`:
    those that the reference knows."""
    known = view.reference.source if logged_only and view.reference else None
    lines = [line for line in view.lines() if known is None or known in line.values]
    compared = {source for line in lines for source in (*line.differences, *line.consistent)}
    columns = [Column("quantity", "left", key=True)]
    for source in view.records:
        columns.append(Column(str(source)))
        if source in compared:
            columns.append(Column(f"{source} - {_reference(view)}"))
    rows: list[list[Text | str]] = []
    for line in lines:
        style = "bold" if line.quantity == "allocated_bytes" else ""
        row: list[Text | str] = [Text(line.label, style)]
        for source in view.records:
            row.append(Text(value_text(line, source), style))
            if source in compared:
                row.append(verdict_text(line, source))
        rows.append(row)
    table(console, columns, rows)


def verdict_text(line: Line, source: Source) -> Text:
    """The difference of one prediction: "exact", or signed bytes and the signed relative error."""
    if source in line.consistent:
        return Text(CONSISTENT, "green")
    if source not in line.differences:
        return Text("")
    difference, error = line.differences[source], line.errors.get(source)
    if line.kind == "time":
        return Text(signed_percent(error))
    if difference == 0:
        return Text(f"{EXACT} (0 B)", "green")
    if line.as_printed(source):
        return Text(f"{AS_PRINTED} ({signed_bytes(difference)})", "green")
    relative = "" if error is None else f" ({signed_percent(error)})"
    return Text(signed_bytes(difference) + relative, "yellow" if error is None or abs(error) > 0.01 else "")


def _reference(view: CaseView) -> str:
    return str(view.reference.source) if view.reference else "measure"
