"""The head of the HTML report: a few numbers as tiles, and one row per case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.records import MemoryRecord
from bf16prof.reports.cells import (
    Cell,
    Table,
    bytes_cell,
    difference_cell,
    number_cell,
    total_cell,
    unknown_cell,
    without_empty,
)
from bf16prof.reports.units import inert, number, seconds
from bf16prof.reports.verdict import VERDICT, case_verdict
from bf16prof.reports.views import CaseView, loss_text, losses, provenance, references
from bf16prof.vocabulary import Source


@dataclass(frozen=True)
class Tile:
    """One number of the headline: what it is, the number, what it means, and whether it is good
    news."""

    title: str
    text: str
    detail: str
    style: str = ""


MOST_ROWS = 24
"""So many cases are shown at once; the others on demand."""

_FILTERS = (("stage", "ZeRO"), ("gpus", "GPUs"), ("recipe", "Recipe"), ("verdict", "Verdict"))


def case_keys(view: CaseView) -> tuple[tuple[str, str], ...]:
    """(name, value) of what a case can be filtered by."""
    said, case = case_verdict(view), view.case
    values = (str(case.zero_stage), str(case.world_size), inert(case.recipe), str(said.answer) if said else "not known")
    return (*zip((key for key, _ in _FILTERS), values, strict=True), ("name", view.label))


def filters(views: Sequence[CaseView]) -> list[tuple[str, str, list[str]]]:
    """(name, title, values) of the filters that part these cases; none where all are in sight
    anyway."""
    if len(views) <= MOST_ROWS // 3:
        return []
    keys = [dict(case_keys(view)) for view in views]
    found = [(key, title, list(dict.fromkeys(known[key] for known in keys))) for key, title in _FILTERS]
    numeric = [(k, t, sorted(v, key=int) if all(x.isdecimal() for x in v) else v) for k, t, v in found]
    return [(key, title, values) for key, title, values in numeric if len(values) > 1]


def summary(views: Sequence[CaseView], anchors: Sequence[str]) -> Table:
    """One row per case, linked to its anchor: what is allocated between steps by source, then its
    peak, verdict, time and loss."""
    sources = [s for s in Source if any(r.source is s for view in views for r in view.predictions)]
    measured = references(views)
    apart = len(views) > MOST_ROWS // 3
    headers = ["case", *(["ZeRO", "GPUs", "recipe"] if apart else [])] + ([measured] if measured else [])
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
    rows = tuple(_summary_row(anchor, view, sources, bool(measured), apart) for anchor, view in zip(anchors, views, strict=True))
    return without_empty(Table("All cases", tuple(headers), rows))


def _summary_row(anchor: str, view: CaseView, sources: Sequence[Source], measured: bool, apart: bool) -> tuple[Cell, ...]:
    case = view.case
    cells = [Cell(view.label, link=f"#{anchor}", keys=case_keys(view))]
    if apart:
        cells += [Cell(str(case.zero_stage), case.zero_stage, "number"), Cell(str(case.world_size), case.world_size, "number")]
        cells.append(Cell(inert(case.recipe), style="label"))
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
