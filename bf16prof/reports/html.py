"""One or more runs as one HTML file that needs nothing else: no network, no other file, and the
same bytes for the same runs.

Every text from a run passes through `units.inert` and Jinja's autoescape (`page.py`); figures
escape for themselves (`plots.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bf16prof.bounds import bound_notes
from bf16prof.documents import as_json, document
from bf16prof.reconcile import REFERENCES
from bf16prof.records import MemoryRecord
from bf16prof.reports import figures, palette, plots
from bf16prof.reports.anchors import anchors
from bf16prof.reports.answers import answers
from bf16prof.reports.asked import asked_lines, settings
from bf16prof.reports.casts_table import casts_table
from bf16prof.reports.cells import Cell, Table, bytes_cell, difference_cell, unknown_cell
from bf16prof.reports.fit_map import fit_maps
from bf16prof.reports.learning import edq_text, lost_text
from bf16prof.reports.limit_lines import limit_of
from bf16prof.reports.loss_table import loss_notes, loss_table, rounding_note
from bf16prof.reports.memory_figure import MOST_CASES
from bf16prof.reports.page import page
from bf16prof.reports.price_table import price_table
from bf16prof.reports.ranks import imbalance, ranks_table
from bf16prof.reports.series import case_styles
from bf16prof.reports.step_panels import CAPTIONS, panels, with_thin_timelines
from bf16prof.reports.summary import MOST_ROWS, case_keys, filters, summary
from bf16prof.reports.thinning import as_kept, thinning_note
from bf16prof.reports.units import MESSAGE_LIMIT, inert, inert_lines, seconds, whole
from bf16prof.reports.verdict import beside_the_allocator, case_verdict, prediction_text
from bf16prof.reports.views import CaseView, Line, case_label, component_name, provenance, run_names, run_views, total_text
from bf16prof.reports.work import HEADERS, work_rows
from bf16prof.runs import CaseStatus, Manifest, Run, Status
from bf16prof.vocabulary import Component, Phase, Source

_MOST_ITEMS = 100
_NOT_STARTED = (Status.PLANNED, Status.RUNNING)


def render(runs: Sequence[Run]) -> str:
    """The report of these runs.

    Records of the same case complete each other across runs; where two runs hold the same source of
    a case, they stay apart.
    """
    runs = with_thin_timelines(runs)
    views = run_views(runs)
    names, drawn = anchors(views), figures.all_figures(views)
    inside, left_out = panels(views)
    return page(
        "report.html.j2",
        document([as_kept(record) for run in runs for record in run.records], runs=[run.manifest for run in runs]),
        names=run_names(runs),
        runs=[_run(run, name) for run, name in zip(runs, run_names(runs), strict=True)],
        asked=asked_lines([record for run in runs for record in run.records]),
        answers=answers(runs, views),
        maps=fit_maps(views),
        filters=filters(views),
        most_rows=MOST_ROWS,
        not_drawn=f"{MOST_CASES} of {len(views)} cases: those nearest to the limit." if len(views) > MOST_CASES else "",
        later=len(views) > MOST_ROWS,
        limited=any(limit_of(view) for view in views),
        failures=[failure for run in runs for failure in _failures(run, views)],
        bounds=[inert(text, MESSAGE_LIMIT) for text in bound_notes(record for run in runs for record in run.records)],
        summary=summary(views, names),
        details=[_details(anchor, view) for anchor, view in zip(names, views, strict=True)],
        figures=drawn,
        losses=loss_table(views),
        loss_notes=loss_notes(views),
        rounding=rounding_note(views),
        thinning=thinning_note([record for run in runs for record in run.records]),
        price=price_table(views),
        panels=inside,
        captions=CAPTIONS,
        panels_left_out=left_out,
        plotly=plots.bundle() if any(drawn.values()) or any(panel.figures for panel in inside) else "",
        components=_component_legend(views),
        phases=[(str(phase), symbol, colour) for phase, (colour, _, symbol) in palette.PHASES.items()],
        series=[(i, view.label, colour, dash) for i, (view, (colour, dash)) in enumerate(zip(views, case_styles(views), strict=True))],
    )


def _component_legend(views: Sequence[CaseView]) -> list[tuple[str, str]]:
    records = [record for view in views for record in view.records.values()]
    used = {component for record in records for component, size in (*record.components.items(), *record.peak_components.items()) if size}
    return [(component_name(component), palette.COMPONENTS[component]) for component in Component if component in used]


def _details(anchor: str, view: CaseView) -> dict[str, Any]:
    record = view.main
    records = list(view.records.values())
    return {
        "id": anchor,
        "keys": case_keys(view),
        "label": view.label,
        "total": total_text(record, "allocated_bytes"),
        "kind": provenance(record),
        "parameters": whole(record.parameters),
        "profile": inert(view.case.profile),
        "gpu": inert(record.gpu) if record.gpu else "",
        "verdict": case_verdict(view),
        "lines": _lines_table(view),
        "items": [
            *(table for r in records for table in (_items_table(r), _quality_table(r), casts_table(r)) if table),
            *_work_tables(records),
            *([table] if (table := ranks_table(record)) else []),
        ],
        "notes": [
            *(f"{record.source}: {text}" for text in imbalance(record)),
            *(f"{r.source}: {text}" for r in records for text in _notes(r)),
        ],
    }


def _notes(record: MemoryRecord) -> list[str]:
    return [text for text in [beside_the_allocator(record), *(inert(note, MESSAGE_LIMIT) for note in record.notes)] if text]


def _lines_table(view: CaseView) -> Table:
    headers = ["quantity"]
    for source in view.records:
        headers.append(str(source))
        headers += [f"{source} error"] if view.reference and source is not view.reference.source else []
    rows = []
    for line in view.lines():
        cells = [Cell(line.label, style="total" if line.quantity == "allocated_bytes" else "", colour=_swatch(line))]
        for source in view.records:
            cells.append(_value(line, source))
            cells += [difference_cell(line, source)] if view.reference and source is not view.reference.source else []
        rows.append(tuple(cells))
    return Table(f"{view.label}: every quantity by source", tuple(headers), tuple(rows))


def _swatch(line: Line) -> str:
    if line.kind == "component":
        return palette.COMPONENTS[Component(line.quantity.removeprefix("components."))]
    return palette.PHASES[Phase(line.quantity.split(".")[1])][0] if line.kind == "phase" else ""


def _value(line: Line, source: Source) -> Cell:
    value = line.values.get(source)
    if value is None:
        return unknown_cell()
    if line.kind == "time":
        return Cell(seconds(value), value, "number")
    return bytes_cell(int(value), at_least=line.at_least and source in REFERENCES)


def _items_table(record: MemoryRecord) -> Table | None:
    if not record.items:
        return None
    largest = sorted(record.items, key=lambda item: -item.bytes)[:_MOST_ITEMS]
    rows = tuple(
        (
            Cell(inert(item.name), colour=palette.COMPONENTS[item.component]),
            Cell(component_name(item.component)),
            bytes_cell(item.bytes),
            Cell(inert(item.source, 200)),
        )
        for item in largest
    )
    left_out = f", the largest {_MOST_ITEMS} of {len(record.items)}" if len(record.items) > _MOST_ITEMS else ""
    return Table(f"Named tensors, {record.source}{left_out}", ("name", "component", "size", "allocated by"), rows)


def _work_tables(records: Sequence[MemoryRecord]) -> Iterator[Table]:
    """One for each source that says something of its own."""
    seen: list[object] = [[]]
    for record in records:
        if (rows := work_rows(record)) in seen:
            continue
        seen.append(rows)
        cells = tuple(tuple(Cell(text, style="" if i != 1 else "number") for i, text in enumerate(row)) for row in rows)
        yield Table(f"Work of a step, {record.source}", HEADERS, cells)


def _quality_table(record: MemoryRecord) -> Table | None:
    """Lost updates and effective descent quality of the last watched step, in total and by
    layer."""
    if not record.quality:
        return None
    last = record.quality[-1]
    rows = tuple(
        (
            Cell(inert(name), style="total" if found is last.total else ""),
            Cell(whole(found.elements), found.elements, "number"),
            unknown_cell() if found.lost_updates is None else Cell(lost_text(found.lost_updates), found.lost_updates, "number"),
            unknown_cell() if found.edq is None else Cell(edq_text(found.edq), found.edq, "number"),
        )
        for name, found in ((("all layers", last.total), *last.layers.items()))
    )
    return Table(f"Updates by layer in step {last.step}, {record.source}", ("layer", "elements", "lost updates", "EDQ"), rows)


def _failures(run: Run, views: Sequence[CaseView]) -> Iterator[dict[str, Any]]:
    for status in run.manifest.cases:
        if status.status is Status.FINISHED or (status.status in _NOT_STARTED and not status.message):
            continue
        same = [view for view in views if view.case == status.case and view.device is run.manifest.device]
        yield {
            "label": case_label(status.case),
            "status": str(status.status),
            "message": inert(status.message, MESSAGE_LIMIT),
            "predicted": [prediction_text(record) for view in same[:1] for record in view.predictions],
            "log": "\n".join(inert_lines(status.log_tail)),
        }


def _run(run: Run, name: str) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "name": name,
        "status": str(manifest.status),
        "good": manifest.status is Status.FINISHED,
        "when": ", ".join(inert(text) for text in (manifest.device, manifest.created, _unfinished(manifest)) if text),
        "device": str(manifest.device),
        "command": inert(" ".join(manifest.argv), 4000),
        "cases": _status_table(manifest.cases),
        "settings": _settings_table(manifest),
        "facts": [
            (title, [(inert(key), inert(value, 400)) for key, value in pairs])
            for title, pairs in (
                ("Run", _facts(manifest)),
                ("Hardware", manifest.hardware.items()),
                *((f"Node {node.node}: {inert(node.host)}", node.hardware.items()) for node in manifest.nodes),
                ("Versions", manifest.versions.items()),
                ("Environment", manifest.environment.items()),
            )
            if pairs
        ],
    }


def _unfinished(manifest: Manifest) -> str:
    """How many cases did not finish, by what became of them; empty where all have."""
    others = [case.status for case in manifest.cases if case.status is not Status.FINISHED]
    counts = ", ".join(f"{others.count(status)} {status}" for status in dict.fromkeys(others))
    return f"{len(manifest.cases) - len(others)} of {len(manifest.cases)} cases finished: {counts}" if others else ""


def _settings_table(manifest: Manifest) -> Table:
    """Every resolved setting of what was trained, with its origin."""
    found = settings(as_json(manifest.profile), manifest.origins)
    rows = tuple(tuple(Cell(inert(text, 400)) for text in (key, str(one["value"]), one["origin"])) for key, one in found.items())
    return Table("Every setting, and where it comes from", ("setting", "value", "from"), rows)


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    times = [("started", manifest.created), ("ended", manifest.finished or "not recorded")] if manifest.created else []
    return [*times, ("device", str(manifest.device))]


def _status_table(cases: Sequence[CaseStatus]) -> Table:
    styles = {Status.FINISHED: "good", Status.PLANNED: "warn", Status.RUNNING: "warn"}
    rows = tuple(
        (
            Cell(case_label(c.case)),
            Cell(inert(c.case.profile)),
            Cell(str(c.status), style=styles.get(c.status, "bad")),
            Cell(inert(c.message, MESSAGE_LIMIT)),
        )
        for c in cases
    )
    return Table("Status of each case", ("case", "profile", "status", "message"), rows)
