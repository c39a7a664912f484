"""Predictions beside the measurement: every quantity of each case with its signed difference, then
one row per case."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bf16prof.bounds import bound_notes
from bf16prof.reports.console.asked import asked
from bf16prof.reports.console.layout import Column, heading, mark, note, safe, table
from bf16prof.reports.console.losses import losses_in_numbers, price_in_learning
from bf16prof.reports.console.peak import verdict_line
from bf16prof.reports.console.quantities import quantities, verdict_text
from bf16prof.reports.palette import CONSOLE
from bf16prof.reports.units import (
    AT_LEAST,
    CONSISTENT,
    MESSAGE_LIMIT,
    UNKNOWN,
    gib,
    inert,
    seconds,
    signed_percent,
)
from bf16prof.reports.verdict import VERDICT, Said, case_verdict
from bf16prof.reports.views import CaseView, Line, headline, loss_text, references, run_views, total_text
from bf16prof.runs import Run
from bf16prof.vocabulary import Source


def reconciliation(runs: Sequence[Run], console: Console) -> None:
    """Print each case in detail, then the summary of all, where a reader's eye ends up."""
    views = run_views(runs)
    if not views:
        note(console, "No records.")
        return
    asked([record for run in runs for record in run.records], console)
    for view in views:
        if view.comparisons:
            heading(console, safe(view.label, limit=240))
            quantities(view, console)
        found = case_verdict(view)
        if found:
            verdict_line(found, console)
    heading(console, "Summary")
    _summary(views, console)
    _verdict(views, console)
    for text in bound_notes(record for run in runs for record in run.records):
        note(console, inert(text, MESSAGE_LIMIT))
    losses_in_numbers(views, console)
    price_in_learning(views, console)
    if any(view.main.at_least for view in views):
        note(console, f"{AT_LEAST}is a lower bound: a log proves so much. A prediction that is not below it is {CONSISTENT}.")
    note(console, f"Errors are (prediction - measured) / measured; 1 GiB = 2^30 bytes; {UNKNOWN} is not known by this source.")


def _summary(views: Sequence[CaseView], console: Console) -> None:
    measured = references(views)
    sources = list(dict.fromkeys(r.source for view in views for r in view.predictions)) if measured else []
    columns = [Column("case", "left", key=True), Column(measured or "allocated")]
    for source in sources:
        columns += [Column(str(source)), Column("error")]
    columns += [
        Column("training peak"),
        Column("whole-run peak"),
        *(Column(f"{source} error") for source in sources),
        Column("reserved"),
        Column(VERDICT, "left"),
        Column("step time"),
        Column("loss"),
    ]
    rows = [_summary_row(view, sources, bool(measured), console) for view in views]
    known = [i for i in range(len(columns)) if i < 2 or any(str(row[i]) != UNKNOWN for row in rows)]
    table(console, [columns[i] for i in known], [[row[i] for i in known] for row in rows])
    note(
        console,
        "Memory allocated between steps" + (f" ({measured}, then predicted). " if measured else ". ") + "The rest is " + _rest(measured),
    )


def _rest(measured: str) -> str:
    return f"{measured} where it was, else predicted." if measured else "predicted: nothing was measured."


def _summary_row(view: CaseView, sources: Sequence[Source], measured: bool, console: Console) -> list[Text | str]:
    main = view.reference if measured else view.main
    row: list[Text | str] = [Text(view.label), total_text(main, "allocated_bytes") if main else UNKNOWN]
    line = view.line("allocated_bytes")
    for source in sources:
        record = view.records.get(source)
        row.append(gib(record.allocated_bytes if record else None))
        row.append(_error(line, source))
    shown = view.main
    whole_run = view.whole_run_only
    row += [total_text(shown, "peak_allocated_bytes"), total_text(shown, "run_peak_allocated_bytes") if whole_run else UNKNOWN]
    row += [_error(whole_run, source) for source in sources]
    row += [total_text(shown, "reserved_bytes"), _fits(case_verdict(view), console)]
    return [*row, seconds(shown.step_time_s), loss_text(shown)]


def _error(line: Line | None, source: Source) -> Text | str:
    return (verdict_text(line, source) if line else Text("")) or UNKNOWN


def _fits(found: Said | None, console: Console) -> Text:
    if found is None:
        return Text(UNKNOWN)
    return Text(f"{mark(console, found.style)} {found.short}", CONSOLE[found.style])


def _verdict(views: Sequence[CaseView], console: Console) -> None:
    head = headline(views)
    if not head.compared:
        return
    text = Text(f"Allocated memory: {head.exact} of {head.compared} predictions exact to the byte")
    if head.as_printed:
        text.append(f", {head.as_printed} as far as was printed")
    if head.worst and head.exact + head.as_printed < head.compared:
        view, line, source = head.worst
        text.append(f"; largest error {signed_percent(line.errors[source])} ({source} of {view.label})")
    if head.worst_peak:
        view, line, source = head.worst_peak
        text.append(f". Peaks: largest error {signed_percent(line.errors[source])} ({source} of {view.label}, {line.label})")
    console.print(text.append("."))
