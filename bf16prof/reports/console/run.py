"""What a run was and how it ended: its machine, the status of each case, and the end of the log
where a case failed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bf16prof.records import Case, MemoryRecord
from bf16prof.reports.console.layout import Column, heading, mark, note, safe, table
from bf16prof.reports.ranks import imbalance, several_hosts
from bf16prof.reports.units import MESSAGE_LIMIT, inert, inert_lines, number, seconds
from bf16prof.reports.verdict import prediction_text
from bf16prof.reports.views import CaseView, case_label, loss_text, run_views, total_text
from bf16prof.runs import CaseStatus, Run, Status
from bf16prof.vocabulary import Device

_STYLES = {Status.FINISHED: "green", Status.PLANNED: "dim", Status.RUNNING: "cyan"}


def run_summary(run: Run, console: Console) -> None:
    """Print the manifest of a run, and one row per case."""
    manifest = run.manifest
    heading(console, Text.assemble("Run ", safe(manifest.name), ": ", _status(manifest.status, console)))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, text in _facts(run):
        grid.add_row(name, Text(text))
    console.print(grid)
    views = _views(run)
    _cases(run, views, console)
    for view in views.values():
        for text in imbalance(view.main) if several_hosts(view.main) else []:
            note(console, f"{view.label}: {text}")


def failures(run: Run, console: Console, *, named: bool = False) -> None:
    """Print what went wrong in each case in which something did: the message, what was predicted,
    the end of the log.

    `named`: by its run.
    """
    views, name = _views(run), f"{inert(run.path, 300)}: " if named else ""
    for status in run.manifest.cases:
        if status.message or status.log_tail:
            _failure(name, status, views.get((status.case, run.manifest.device)), console)


def _views(run: Run) -> dict[tuple[Case, Device], CaseView]:
    return {(view.case, view.device): view for view in run_views([run])}


def _facts(run: Run) -> list[tuple[str, str]]:
    manifest = run.manifest
    ended = f", ended {inert(manifest.finished)}" if manifest.finished else ""
    facts = [
        ("folder", inert(run.path, 300)),
        ("device", str(manifest.device)),
        ("started", f"{inert(manifest.created)}{ended}"),
        ("command", inert(" ".join(manifest.argv), 4000)),
        ("hardware", _pairs(manifest.hardware)),
        ("nodes", ", ".join(f"{node.node} {inert(node.host)}" for node in manifest.nodes)),
        ("versions", _pairs(manifest.versions)),
    ]
    return [(name, text) for name, text in facts if text]


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{inert(name)} {inert(value, 200)}" for name, value in values.items())


def _status(status: Status, console: Console) -> Text:
    good = status is Status.FINISHED
    symbol = mark(console, "good" if good else "warn" if status in _STYLES else "bad")
    return Text(f"{symbol} {status}", _STYLES.get(status, "red"))


def _cases(run: Run, views: Mapping[tuple[Case, Device], CaseView], console: Console) -> None:
    columns = [Column("case", "left", key=True), Column("status", "left"), Column("allocated"), Column("training peak")]
    columns += [Column("step time"), Column("IQR"), Column("tokens/s"), Column("loss")]
    utilised = any(record.mfu is not None for record in run.records)
    columns += [Column("MFU")] if utilised else []
    rows: list[list[Text | str]] = []
    for status in run.manifest.cases:
        view = views.get((status.case, run.manifest.device))
        numbers = [*_numbers(view), *([_utilisation(view)] if utilised else [])]
        rows.append([Text(case_label(status.case)), _status(status.status, console), *numbers])
    if rows:
        table(console, columns, rows)


def _utilisation(view: CaseView | None) -> str:
    record = view.reference if view else None
    return "" if record is None or record.mfu is None else f"{record.mfu:.1%}"


def _numbers(view: CaseView | None) -> list[Text | str]:
    record: MemoryRecord | None = view.reference if view else None
    if record is None:
        return [""] * 6
    return [
        total_text(record, "allocated_bytes"),
        total_text(record, "peak_allocated_bytes"),
        seconds(record.step_time_s),
        seconds(record.step_time_iqr_s),
        number(record.tokens_per_s),
        loss_text(record),
    ]


def _failure(name: str, status: CaseStatus, view: CaseView | None, console: Console) -> None:
    style = "" if status.status is Status.FINISHED else "red"
    console.print(Text(f"{name}{case_label(status.case)}: {status.status}: {inert(status.message, MESSAGE_LIMIT)}", style))
    for prediction in view.predictions if view else []:
        console.print(Text("  " + prediction_text(prediction)))
    for line in inert_lines(status.log_tail):
        console.print(Text(f"  | {line}", "dim"))
