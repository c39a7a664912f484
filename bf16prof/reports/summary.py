"""The head of the HTML report: a few numbers as tiles, and one row per case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.records import MemoryRecord, Source
from bf16prof.reports.cells import (
    Cell,
    Table,
    bytes_cell,
    difference_cell,
    error_style,
    number_cell,
    total_cell,
    unknown_cell,
    without_empty,
)
from bf16prof.reports.units import AS_PRINTED, EXACT, NOT_FINITE, inert, number, seconds, signed_percent
from bf16prof.reports.verdict import VERDICT, case_verdict
from bf16prof.reports.views import CaseView, Headline, headline, loss_text, losses, provenance, references, total_text
from bf16prof.runs import Run, Status


@dataclass(frozen=True)
class Tile:
    """One number of the headline: what it is, the number, what it means, and whether it is good news."""

    title: str
    text: str
    detail: str
    style: str = ""


def tiles(runs: Sequence[Run], views: Sequence[CaseView]) -> list[Tile]:
    """The numbers to read first: how good the predictions are, whether the cases fit, the least memory, the fastest step."""
    head = headline(views)
    tiles = [_steady_tile(head), *_peak_tile(head), *_fits_tile(views)]
    smallest = min((v for v in views if v.main.allocated_bytes is not None), key=lambda v: v.main.allocated_bytes or 0, default=None)
    if smallest:
        instant = f"{smallest.label}, allocated between steps, {provenance(smallest.main)}"
        tiles.append(Tile("Least memory", total_text(smallest.main, "allocated_bytes"), instant))
    fastest = min((v for v in views if v.main.step_time_s is not None), key=lambda v: v.main.step_time_s or 0.0, default=None)
    if fastest:
        tiles.append(Tile("Fastest step", seconds(fastest.main.step_time_s), fastest.label + _rate(fastest.main.tokens_per_s)))
    tiles += _losses_tile(views)
    statuses = [status.status for run in runs for status in run.manifest.cases]
    done = statuses.count(Status.FINISHED)
    if statuses:
        others = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses) if s is not Status.FINISHED)
        tiles.append(Tile("Cases finished", f"{done} of {len(statuses)}", others or "none missing", "" if done == len(statuses) else "bad"))
    return tiles


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f", {number(tokens_per_s)} tokens/s"


def _steady_tile(head: Headline) -> Tile:
    title = "Predicted allocated memory"
    if not head.compared:
        return Tile(title, "not measured" if not head.measured else "not predicted", f"{head.cases} cases, nothing to compare")
    if head.exact == head.compared:
        return Tile(title, EXACT, f"to the byte, {head.exact} of {head.compared} predictions", "good")
    if head.exact + head.as_printed == head.compared:
        return Tile(title, AS_PRINTED, f"within the rounding of the log, {head.as_printed} of {head.compared} predictions", "good")
    exact = f"{head.exact} of {head.compared} exact"
    if head.worst is None:
        return Tile(title, exact, "predictions, to the byte")
    view, line, source = head.worst
    error = signed_percent(line.errors[source])
    where = f"largest error {error}, {source} of {view.label}" if head.exact else f"largest error, {source} of {view.label}"
    return Tile(title, exact if head.exact else error, where, error_style(line, source))


def _peak_tile(head: Headline) -> list[Tile]:
    if head.worst_peak is None:
        return []
    view, line, source = head.worst_peak
    text = EXACT if line.errors[source] == 0 else signed_percent(line.errors[source])
    return [Tile("Predicted peaks", text, f"largest error, {source} of {view.label}, {line.label}", error_style(line, source))]


def _losses_tile(views: Sequence[CaseView]) -> list[Tile]:
    curves = {view.label: curve for view in views if (curve := losses(view.main))}
    lost = [label for label, curve in curves.items() if any(loss is None for _, loss in curve)]
    if not lost:
        return []
    return [Tile("Loss", NOT_FINITE, f"in {len(lost)} of {len(curves)} cases: {', '.join(lost[:3])}{_more(lost)}", "bad")]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _fits_tile(views: Sequence[CaseView]) -> list[Tile]:
    found = [(view, said) for view in views if (said := case_verdict(view))]
    without = [view.label for view, said in found if not said.fits]
    style = next((style for style in ("bad", "warn") if any(said.style == style for _, said in found)), "good")
    if not found:
        return []
    detail = f"tight or too large: {', '.join(without[:3])}{_more(without)}"
    gpus = ", ".join(dict.fromkeys(inert(record.gpu) for view, _ in found for record in view.predictions if record.gpu))
    text = f"{len(found) - len(without)} of {len(found)} cases"
    return [Tile("Fits the GPU", text, detail if without else gpus, style)]


def summary(views: Sequence[CaseView]) -> Table:
    """One row per case: what is allocated between steps by source, then the case's peak, verdict, time and loss."""
    sources = [s for s in Source if any(r.source is s for view in views for r in view.predictions)]
    measured = references(views)
    headers = ["case"] + ([measured] if measured else [])
    for source in sources:
        headers += [str(source)] + (["error"] if measured else [])
    headers += [
        "training peak",
        *([f"{s} error" for s in sources] if measured else []),
        "whole-run peak",
        *([f"{s} error" for s in sources] if measured else []),
        "reserved",
        "on the device",
        VERDICT,
        "step time",
        "step time floor",
        "MFU",
        "tokens/s",
        "loss",
    ]
    rows = tuple(_summary_row(index, view, sources, bool(measured)) for index, view in enumerate(views))
    return without_empty(Table("All cases", tuple(headers), rows))


def _summary_row(index: int, view: CaseView, sources: Sequence[Source], measured: bool) -> tuple[Cell, ...]:
    cells = [Cell(view.label, link=f"#case-{index}")]
    steady, peak = view.line("allocated_bytes"), view.line("peak_allocated_bytes")
    if measured:
        cells.append(total_cell(view.reference, "allocated_bytes") if view.reference else unknown_cell())
    for source in sources:
        record = view.records.get(source)
        cells.append(bytes_cell(record.allocated_bytes if record else None))
        cells += [difference_cell(steady, source)] if measured else []
    main = view.main
    where = f"{provenance(main)}, in {main.peak_phase}" if main.peak_phase else provenance(main)
    cells.append(total_cell(main, "peak_allocated_bytes", title=where))
    cells += [difference_cell(peak, source) for source in sources] if measured else []
    whole_run = view.whole_run_only
    included = f"{provenance(main)}, init included"
    cells.append(total_cell(main, "run_peak_allocated_bytes", title=included) if whole_run else unknown_cell())
    cells += [difference_cell(whole_run, source) for source in sources] if measured else []
    cells += [total_cell(main, "reserved_bytes"), total_cell(main, "device_bytes"), _fits(view)]
    spread = f"interquartile range {seconds(main.step_time_iqr_s)}" if main.step_time_iqr_s is not None else ""
    if main.step_time_error_s is not None:
        spread = f"calibrated, ± {seconds(main.step_time_error_s)}"
    cells.append(unknown_cell() if main.step_time_s is None else Cell(seconds(main.step_time_s), main.step_time_s, "number", title=spread))
    lowest = next((r.step_time_floor_s for r in view.records.values() if r.step_time_floor_s is not None), None)
    cells.append(unknown_cell() if lowest is None else Cell(seconds(lowest), lowest, "number", title="no step on this GPU is faster"))
    cells.append(unknown_cell() if main.mfu is None else Cell(f"{main.mfu:.1%}", main.mfu, "number"))
    cells.append(unknown_cell() if main.tokens_per_s is None else Cell(number(main.tokens_per_s), main.tokens_per_s, "number"))
    return (*cells, _loss(main))


def _fits(view: CaseView) -> Cell:
    said = case_verdict(view)
    return Cell(said.marked, style=said.style, title=said.text) if said else unknown_cell()


def _loss(record: MemoryRecord) -> Cell:
    curve = losses(record)
    if not curve:
        return number_cell(record.loss)
    lost = any(loss is None for _, loss in curve)
    text, _, steps = loss_text(record, "→").rstrip(")").partition(" (")
    return Cell(text, curve[-1][1], "number bad" if lost else "number", detail=steps)
