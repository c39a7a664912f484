"""One record, component by component and item by item: where the bytes went, and who allocated
them."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from bf16prof.records import Item, MemoryRecord
from bf16prof.reports.console.layout import Column, heading, note, safe, table
from bf16prof.reports.console.peak import training_peak, verdict_line
from bf16prof.reports.ranks import imbalance, ranks_table
from bf16prof.reports.units import MESSAGE_LIMIT, gib, inert, seconds, share, whole
from bf16prof.reports.verdict import beside_the_allocator, verdict
from bf16prof.reports.views import MEMORY_TOTALS, bound, case_label, component_name, total_text
from bf16prof.reports.work import HEADERS, work_rows
from bf16prof.vocabulary import Component, Phase

_COLUMNS = (Column("component", "left", key=True), Column("size"), Column("bytes"), Column("share"), Column("allocated by", "left"))


def breakdown(record: MemoryRecord, console: Console) -> None:
    """Print the components of one record, largest first, with their items; the same for its peak;
    its other totals, verdict and notes."""
    heading(console, Text.assemble(case_label(record.case), f", {record.source}, {inert(record.case.profile)}"))
    rows: list[list[Text | str]] = []
    for component, size in sorted(record.components.items(), key=lambda pair: -pair[1]):
        if size:
            items = sorted((i for i in record.items if i.component is component), key=lambda i: -i.bytes)
            rows += _component(component, size, items, record.allocated_bytes)
    rows.append(_row("allocated", record.allocated_bytes, record.allocated_bytes, "", "bold"))
    columns = _COLUMNS if any(item.source for item in record.items) else _COLUMNS[:-1]
    table(console, columns, [row[: len(columns)] for row in rows])
    training_peak(record, console)
    _totals(record, console)
    _work(record, console)
    _ranks(record, console)
    found = verdict(record)
    if found:
        verdict_line(found, console)
    notes(record, console)


def notes(record: MemoryRecord, console: Console) -> None:
    """Print what a record says of itself."""
    for text in record.notes:
        note(console, inert(text, MESSAGE_LIMIT))


def _work(record: MemoryRecord, console: Console) -> None:
    rows = work_rows(record)
    if rows:
        what, amount, of_it = HEADERS
        table(console, (Column(what, "left", key=True), Column(amount), Column(of_it, "left")), rows)


def _ranks(record: MemoryRecord, console: Console) -> None:
    found = ranks_table(record)
    if found:
        columns = [Column(header, "left" if header in ("host", "device") else "right", key=header == "rank") for header in found.headers]
        table(console, columns, [[cell.text for cell in row] for row in found.rows])
        for text in imbalance(record):
            note(console, text)


def _component(component: Component, size: int, items: list[Item], total: int | None) -> list[list[Text | str]]:
    alone = items[0] if len(items) == 1 and items[0].bytes == size else None
    if alone is not None:
        return [_row(f"{component_name(component)}: {inert(alone.name)}", size, total, alone.source, "bold")]
    rows = [_row(component_name(component), size, total, "", "bold")]
    rows += [_row(f"  {inert(item.name)}", item.bytes, total, item.source) for item in items]
    rest = size - sum(item.bytes for item in items)
    if items and rest:
        rows.append(_row("  (not itemised)", rest, total, ""))
    return rows


def _row(name: str, size: int | None, total: int | None, source: str, style: str = "") -> list[Text | str]:
    numbers = [Text(text, style) for text in (gib(size), whole(size), share(size, total))]
    return [Text(name, style), *numbers, safe(source, "dim")]


def _totals(record: MemoryRecord, console: Console) -> None:
    parts = [
        f"{label} {total_text(record, name)}"
        + (f" (in {record.peak_phase})" if name == "peak_allocated_bytes" and record.peak_phase else "")
        for name, label in MEMORY_TOTALS.items()
        if name != "allocated_bytes" and getattr(record, name)
    ]
    phases = [
        f"{phase} {bound(record, f'phases.{phase}.peak_bytes')}{gib(memory.peak_bytes)}"
        for phase in Phase
        if (memory := record.phases.get(phase)) and memory.peak_bytes is not None
    ]
    if phases:
        parts.append("peak by phase: " + ", ".join(phases))
    if record.step_time_s is not None:
        parts.append(f"step time {seconds(record.step_time_s)}")
    parts += [text for text in [beside_the_allocator(record)] if text]
    for part in parts:
        console.print(Text(part))
