"""What fits a GPU, for a person who has to choose: the ranked plans, what the first of them is made
of, and what the others lose."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bf16prof.plans import Outlook, Plan
from bf16prof.records import MemoryRecord
from bf16prof.reports import plan_rows
from bf16prof.reports.cells import Cell, Table
from bf16prof.reports.console.bar import memory_bar
from bf16prof.reports.console.fitted import Fitted, fitted
from bf16prof.reports.console.layout import Column, heading, mark, note, table
from bf16prof.reports.console.peak import peak_components
from bf16prof.reports.palette import CONSOLE
from bf16prof.reports.units import gib, inert
from bf16prof.reports.verdict import STYLES
from bf16prof.verdict import allocator_limit
from bf16prof.vocabulary import Offload, Phase

_KEYS = ("#", "GPUs", "ZeRO", "recipe", "change", "alive at the training peak")
_FOLDED = {"micro-batch": "micro-\nbatch", "tokens/s at most": "tokens/s\nat most"}


def plan_view(
    outlook: Outlook, console: Console, *, profile: str, parameters: int, record: MemoryRecord | None, verbose: bool = False
) -> None:
    """Print an outlook: on one screen, or all that is known of each plan. `record`: that of the
    first plan."""
    if record is not None and not verbose:
        _one_screen(outlook, console, record)
        return
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


def _one_screen(outlook: Outlook, console: Console, record: MemoryRecord) -> None:
    """The verdict on the first choice, its peak as a bar, one row per plan, and how far the first
    choice goes."""
    first = outlook.plans[0]
    style = STYLES[first.verdict] if first.verdict else "good"
    console.print(Text(f"{mark(console, style)} {plan_rows.first_choice(outlook)}", CONSOLE[style]))
    heading(console, Text(f"The first choice at the training peak, in {record.peak_phase}: {gib(record.peak_allocated_bytes)}"))
    memory_bar(record.peak_components, record.peak_allocated_bytes or 0, allocator_limit(record), console)
    console.print()
    console.print(_brief(outlook.plans, console))
    for text in plan_rows.brief_notes(outlook):
        note(console, text)
    heading(console, "The first choice goes as far as")
    for line in plan_rows.limit_lines(first, outlook.limits):
        console.print(Text(f"  {line}"))
    if outlook.stages is not None:
        _stages(outlook, console)


_GIB = 2**30


def _brief(plans: Sequence[Plan], console: Console) -> RichTable:
    """One row per plan, in one piece at 80 columns."""
    columns = (
        Fitted(" #"), Fitted("ZeRO"), Fitted("recipe", justify="left"), Fitted("offload", justify="left"), Fitted("micro-\nbatch"),
        Fitted("check-\npointing", justify="left"), Fitted("peak\nGiB"), Fitted("reserved\nGiB", 2), Fitted("free\nGiB"),
        Fitted("tokens/s\nat most", 3), Fitted("tokens/s\ncalibrated", 3), Fitted("tried", 1),
    )  # fmt: skip
    return fitted(columns, [_brief_row(n, plan) for n, plan in enumerate(plans, 1)], console.width)


def _brief_row(rank: int, plan: Plan) -> list[Text]:
    offload = "" if plan.case.offload is Offload.NONE else str(plan.case.offload).replace("optimizer+parameters", "both")
    known = plan.tokens_per_s_at_most, plan.tokens_per_s
    sizes = plan.peak_bytes, plan.reserved_bytes, plan.free_bytes
    peak, reserved, free = ("" if size is None else f"{size / _GIB:,.2f}" for size in sizes)
    words = [str(rank), str(plan.case.zero_stage), inert(plan.case.recipe), offload, str(plan.micro_batch_size)]
    words += ["on" if plan.activation_checkpointing else "off", peak, reserved, free]
    words += ["" if rate is None else f"{rate:,.0f}" for rate in known]
    row = [*map(Text, words), Text("yes" if plan.is_tried else "")]
    row[2].stylize("bold" if rank == 1 else "")
    return row


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
