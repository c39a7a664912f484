"""One or more runs as one HTML file that needs nothing else: no network, no other file, and the same bytes for the same runs.

The page works under `Content-Security-Policy: default-src 'none'` with inline script and style, and says so itself in a meta tag.
Every text from a run passes through `units.inert` and Jinja's autoescape; figures escape for themselves (`figures.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from bf16prof.records import Component, MemoryRecord, Phase, Source, as_json, document
from bf16prof.reports import figures, palette
from bf16prof.reports.units import EXACT, gib, inert, inert_lines, number, seconds, signed_bytes, signed_percent, whole
from bf16prof.reports.views import (
    CaseView,
    Headline,
    Line,
    case_label,
    component_name,
    headline,
    losses,
    prediction_text,
    run_names,
    run_views,
)  # fmt: skip
from bf16prof.runs import CaseStatus, Run, Status

_MOST_ITEMS = 100
_NOT_STARTED = (Status.PLANNED, Status.RUNNING)


@dataclass(frozen=True)
class Cell:
    """A cell: what is read, what it sorts by (the text where there is none), its class, and a link or a component's colour."""

    text: str
    value: float | None = None
    style: str = ""
    link: str = ""
    colour: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on a header. `numeric` says which columns are right-aligned."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = True


@dataclass(frozen=True)
class Tile:
    """One number of the headline: what it is, the number, what it means, and whether it is good news."""

    title: str
    text: str
    detail: str
    style: str = ""


def render(runs: Sequence[Run]) -> str:
    """The report of these runs.

    Records of the same case complete each other across runs; where two runs hold the same source of a case, they stay apart.
    """
    import jinja2

    views = run_views(runs)
    drawn = figures.all_figures(views)
    loader = jinja2.FunctionLoader(_template)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inert"] = inert
    return environment.get_template("report.html.j2").render(
        names=run_names(runs),
        runs=[_run(run, name) for run, name in zip(runs, run_names(runs), strict=True)],
        tiles=_tiles(runs, views),
        failures=[failure for run in runs for failure in _failures(run, views)],
        summary=_summary(views),
        details=[_details(index, view) for index, view in enumerate(views)],
        figures=drawn,
        plotly=figures.bundle() if any(drawn.values()) else "",
        components=_component_legend(views),
        phases=[(str(phase), symbol, colour) for phase, (colour, _, symbol) in palette.PHASES.items()],
        series=[
            (i, view.label, colour, dash) for i, (view, (colour, dash)) in enumerate(zip(views, figures.case_styles(views), strict=True))
        ],
        data=_finite(_data(runs)),
        css=_template("report.css"),
        js=_template("report.js"),
    )


def _template(name: str) -> str:
    return (resources.files("bf16prof.reports") / "templates" / name).read_text(encoding="utf-8")


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    return document([record for run in runs for record in run.records], runs=[run.manifest for run in runs])


def _finite(value: Any) -> Any:
    """The same JSON with NaN and infinity as null: neither is JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _component_legend(views: Sequence[CaseView]) -> list[tuple[str, str]]:
    used = {component for view in views for record in view.records.values() for component, size in record.components.items() if size}
    return [(component_name(component), palette.COMPONENTS[component]) for component in Component if component in used]


def _tiles(runs: Sequence[Run], views: Sequence[CaseView]) -> list[Tile]:
    head = headline(views)
    tiles = [_steady_tile(head), *_peak_tile(head)]
    smallest = min((v for v in views if v.main.allocated_bytes is not None), key=lambda v: v.main.allocated_bytes or 0, default=None)
    if smallest:
        instant = f"{smallest.label}, allocated between steps, {_kind(smallest.main)}"
        tiles.append(Tile("Least memory", gib(smallest.main.allocated_bytes), instant))
    fastest = min((v for v in views if v.main.step_time_s is not None), key=lambda v: v.main.step_time_s or 0.0, default=None)
    if fastest:
        tiles.append(
            Tile("Fastest step", seconds(fastest.main.step_time_s), f"{fastest.label}, {number(fastest.main.tokens_per_s)} tokens/s")
        )
    statuses = [status.status for run in runs for status in run.manifest.cases]
    done = statuses.count(Status.FINISHED)
    if statuses:
        others = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses) if s is not Status.FINISHED)
        tiles.append(Tile("Cases finished", f"{done} of {len(statuses)}", others or "none missing", "" if done == len(statuses) else "bad"))
    return tiles


def _steady_tile(head: Headline) -> Tile:
    title = "Predicted allocated memory"
    if not head.compared:
        return Tile(title, "not measured" if not head.measured else "not predicted", f"{head.cases} cases, nothing to compare")
    if head.exact == head.compared:
        return Tile(title, EXACT, f"to the byte, {head.exact} of {head.compared} predictions", "good")
    exact = f"{head.exact} of {head.compared} exact"
    if head.worst is None:
        return Tile(title, exact, "predictions, to the byte")
    view, line, source = head.worst
    error = signed_percent(line.errors[source])
    where = f"largest error {error}, {source} of {view.label}" if head.exact else f"largest error, {source} of {view.label}"
    return Tile(title, exact if head.exact else error, where, _error_style(line, source))


def _peak_tile(head: Headline) -> list[Tile]:
    if head.worst_peak is None:
        return []
    view, line, source = head.worst_peak
    text = EXACT if line.errors[source] == 0 else signed_percent(line.errors[source])
    return [Tile("Predicted peaks", text, f"largest error, {source} of {view.label}, {line.label}", _error_style(line, source))]


def _error_style(line: Line, source: Source) -> str:
    error = line.errors.get(source)
    if error is None:
        return "warn"
    return "good" if abs(error) <= 0.01 else "warn" if abs(error) <= 0.05 else "bad"


def _kind(record: MemoryRecord) -> str:
    return {Source.MEASURE: "measured", Source.IMPORT: "imported"}.get(record.source, f"predicted ({record.source})")


def _summary(views: Sequence[CaseView]) -> Table:
    sources = [s for s in Source if any(r.source is s for view in views for r in view.predictions)]
    measured = any(view.reference for view in views)
    headers = ["case"] + (["measured"] if measured else [])
    for source in sources:
        headers += [str(source)] + (["error"] if measured else [])
    headers += [
        "training peak",
        *([f"{s} error" for s in sources] if measured else []),
        "reserved",
        "device (NVML)",
        "step time",
        "tokens/s",
        "loss",
    ]
    rows = tuple(_summary_row(index, view, sources, measured) for index, view in enumerate(views))
    return _without_empty(Table("All cases", tuple(headers), rows))


def _summary_row(index: int, view: CaseView, sources: Sequence[Source], measured: bool) -> tuple[Cell, ...]:
    cells = [Cell(view.label, link=f"#case-{index}")]
    steady, peak = view.line("allocated_bytes"), view.line("peak_allocated_bytes")
    if measured:
        cells.append(_bytes(view.reference.allocated_bytes if view.reference else None))
    for source in sources:
        record = view.records.get(source)
        cells.append(_bytes(record.allocated_bytes if record else None))
        cells += [_difference(steady, source)] if measured else []
    main = view.main
    cells.append(_bytes(main.peak_allocated_bytes, title=f"{_kind(main)}, in {main.peak_phase}" if main.peak_phase else _kind(main)))
    cells += [_difference(peak, source) for source in sources] if measured else []
    cells += [_bytes(main.reserved_bytes), _bytes(main.device_bytes)]
    spread = f"interquartile range {seconds(main.step_time_iqr_s)}" if main.step_time_iqr_s is not None else ""
    cells.append(_unknown() if main.step_time_s is None else Cell(seconds(main.step_time_s), main.step_time_s, "number", title=spread))
    cells.append(_unknown() if main.tokens_per_s is None else Cell(number(main.tokens_per_s), main.tokens_per_s, "number"))
    return (*cells, _loss(main))


def _without_empty(table: Table) -> Table:
    """The table without the columns that no row knows."""
    kept = [i for i in range(len(table.headers)) if any(row[i].style != "unknown" for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.caption, tuple(table.headers[i] for i in kept), rows, table.sortable)


def _unknown() -> Cell:
    return Cell("–", style="unknown", title="not known by this source")  # noqa: RUF001


def _bytes(value: int | None, *, title: str = "") -> Cell:
    if value is None:
        return _unknown()
    return Cell(gib(value), value, "number", title=f"{whole(value)} B" + (f", {title}" if title else ""))


def _difference(line: Line | None, source: Source) -> Cell:
    if line is None or source not in line.differences:
        return _unknown()
    difference, error = line.differences[source], line.errors.get(source)
    style = f"number {_error_style(line, source)}"
    if line.kind == "time":
        return Cell(signed_percent(error), error, style)
    if difference == 0:
        return Cell(EXACT, 0, "number good", title="0 B")
    text = signed_bytes(difference) if error is None else f"{signed_bytes(difference)} ({signed_percent(error)})"
    return Cell(text, difference if error is None else error, style, title=f"{difference:+,} B")


def _loss(record: MemoryRecord) -> Cell:
    curve = losses(record)
    if curve:
        return Cell(f"{number(curve[0][1])} → {number(curve[-1][1])}", curve[-1][1], "number")
    return _unknown() if record.loss is None else Cell(number(record.loss), record.loss, "number")


def _details(index: int, view: CaseView) -> dict[str, Any]:
    record = view.main
    records = list(view.records.values())
    return {
        "id": f"case-{index}",
        "label": view.label,
        "total": gib(record.allocated_bytes),
        "kind": _kind(record),
        "parameters": whole(record.parameters),
        "profile": inert(view.case.profile),
        "gpu": inert(record.gpu) if record.gpu else "",
        "lines": _lines_table(view),
        "items": [table for r in records if (table := _items_table(r))],
        "notes": [f"{r.source}: {inert(text, 600)}" for r in records for text in r.notes],
        "ranks": ", ".join(f"rank {rank}: {gib(size)}" for rank, size in enumerate(record.rank_allocated_bytes[:64])),
    }


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
            cells += [_difference(line, source)] if view.reference and source is not view.reference.source else []
        rows.append(tuple(cells))
    return Table(f"{view.label}: every quantity by source", tuple(headers), tuple(rows))


def _swatch(line: Line) -> str:
    if line.kind == "component":
        return palette.COMPONENTS[Component(line.quantity.removeprefix("components."))]
    return palette.PHASES[Phase(line.quantity.split(".")[1])][0] if line.kind == "phase" else ""


def _value(line: Line, source: Source) -> Cell:
    value = line.values.get(source)
    if value is None:
        return _unknown()
    return Cell(seconds(value), value, "number") if line.kind == "time" else _bytes(int(value))


def _items_table(record: MemoryRecord) -> Table | None:
    if not record.items:
        return None
    largest = sorted(record.items, key=lambda item: -item.bytes)[:_MOST_ITEMS]
    rows = tuple(
        (
            Cell(inert(item.name), colour=palette.COMPONENTS[item.component]),
            Cell(component_name(item.component)),
            _bytes(item.bytes),
            Cell(inert(item.source, 200)),
        )
        for item in largest
    )
    left_out = f", the largest {_MOST_ITEMS} of {len(record.items)}" if len(record.items) > _MOST_ITEMS else ""
    return Table(f"Named tensors, {record.source}{left_out}", ("name", "component", "size", "allocated by"), rows)


def _failures(run: Run, views: Sequence[CaseView]) -> Iterator[dict[str, Any]]:
    for status in run.manifest.cases:
        if status.status is Status.FINISHED or (status.status in _NOT_STARTED and not status.message):
            continue
        same = [view for view in views if view.case == status.case and view.device is run.manifest.device]
        yield {
            "label": case_label(status.case),
            "status": str(status.status),
            "message": inert(status.message, 600),
            "predicted": [prediction_text(record) for view in same[:1] for record in view.predictions],
            "log": "\n".join(inert_lines(status.log_tail)),
        }


def _run(run: Run, name: str) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "name": name,
        "status": str(manifest.status),
        "good": manifest.status is Status.FINISHED,
        "created": inert(manifest.created),
        "device": str(manifest.device),
        "command": inert(" ".join(manifest.argv), 4000),
        "cases": _status_table(manifest.cases),
        "facts": [
            (title, [(inert(key), inert(value, 400)) for key, value in pairs])
            for title, pairs in (
                ("Run", [("started", manifest.created), ("ended", manifest.finished or "not recorded"), ("device", manifest.device)]),
                ("Hardware", manifest.hardware.items()),
                ("Versions", manifest.versions.items()),
                ("Environment", manifest.environment.items()),
                ("Profile", _flat(as_json(manifest.profile))),
            )
            if pairs
        ],
    }


def _status_table(cases: Sequence[CaseStatus]) -> Table:
    styles = {Status.FINISHED: "good", Status.PLANNED: "warn", Status.RUNNING: "warn"}
    rows = tuple(
        (
            Cell(case_label(c.case)),
            Cell(inert(c.case.profile)),
            Cell(str(c.status), style=styles.get(c.status, "bad")),
            Cell(inert(c.message, 600)),
        )
        for c in cases
    )
    return Table("Status of each case", ("case", "profile", "status", "message"), rows)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested profile as (dotted key, text) pairs."""
    out: list[tuple[str, str]] = []
    for key, item in value.items():
        out += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else [(f"{prefix}{key}", str(item))]
    return out
