"""What fits a GPU, for a person who has to choose: the ranked plans, what the first of them is made of, and what the others lose."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bf16prof.plans import Outlook
from bf16prof.records import MemoryRecord, Phase
from bf16prof.reports import plan_rows
from bf16prof.reports.cells import Cell, Table
from bf16prof.reports.console.layout import Column, heading, mark, note, table
from bf16prof.reports.console.peak import peak_components
from bf16prof.reports.palette import CONSOLE

_KEYS = ("#", "GPUs", "ZeRO", "recipe", "change", "alive at the training peak")
_FOLDED = {"micro-batch": "micro-\nbatch", "tokens/s at most": "tokens/s\nat most"}


def plan_view(outlook: Outlook, console: Console, *, profile: str, parameters: int, record: MemoryRecord | None) -> None:
    """Print an outlook. `record`: that of the first plan."""
    heading(console, plan_rows.title(outlook, profile, parameters))
    console.print(Text(plan_rows.room_text(outlook.room)))
    if record is not None:
        _choices(outlook, console, record)
    else:
        _nothing(outlook, console)
    if outlook.stages is not None:
        _stages(outlook, console)
    for text in plan_rows.left_out_text(outlook):
        note(console, text)


def plan_sizes(outlooks: Sequence[Outlook], console: Console, *, profile: str, parameters: int) -> None:
    """Print the first choice on each number of GPUs."""
    heading(console, f"{plan_rows.title(outlooks[0], profile, parameters).partition(', on ')[0]}, by the number of GPUs")
    console.print(Text(plan_rows.room_text(outlooks[-1].room)))
    _print(console, plan_rows.size_rows(outlooks))
    note(console, "Tokens/s at most: an upper bound, from the floor of the step's time. -v shows the plans of each number.")


def _choices(outlook: Outlook, console: Console, record: MemoryRecord) -> None:
    _print(console, plan_rows.plan_rows(outlook.plans))
    for text in plan_rows.order_text(outlook):
        note(console, text)
    first = outlook.plans[0]
    heading(console, f"First choice: {plan_rows.plan_words(first)}")
    for line in plan_rows.limit_lines(first, outlook.limits):
        console.print(Text(f"  {line}"))
    if first.peak_phase is Phase.INIT:
        console.print(Text(f"  {first.peak_phase} sets the whole-run peak; the training peak is below it"))
    peak_components(record, console)


def _nothing(outlook: Outlook, console: Console) -> None:
    first, *rest = plan_rows.nearest_lines(outlook)
    console.print()
    console.print(Text(f"{mark(console, 'bad')} {first}", "bold red"))
    for line in rest:
        console.print(Text(line))
    if outlook.changes:
        changes = plan_rows.change_rows(outlook)
        heading(console, changes.caption)
        _print(console, changes)
    else:
        console.print(Text("No change of it saves anything: use another model, a shorter sequence or a larger GPU."))


def _stages(outlook: Outlook, console: Console) -> None:
    stages = outlook.stages
    assert stages is not None, "there is something to compare"
    if stages.more_bytes > 0:
        differences = plan_rows.difference_rows(stages)
        heading(console, differences.caption)
        _print(console, differences)
    for line in plan_rows.stage_lines(stages):
        console.print(Text(f"  {line}"))


def _print(console: Console, found: Table) -> None:
    columns = [Column(_FOLDED.get(h, h), "left" if h in plan_rows.LEFT else "right", key=h in _KEYS) for h in found.headers]
    table(
        console,
        columns,
        [[_cell(header, cell, n) for header, cell in zip(found.headers, row, strict=True)] for n, row in enumerate(found.rows)],
    )


def _cell(header: str, cell: Cell, row: int) -> Text:
    """What is read first, and dim what explains it."""
    strong = "bold" if header == "recipe" and row == 0 else CONSOLE.get(cell.style, "")
    return Text.assemble((cell.text, strong), (f"\n{cell.detail}" if cell.detail else "", "dim"))
