"""The figures of the HTML report that show all cases in one: components, peaks by phase, steps and step times.

They keep the rules of `plots.py`. Losses have a module of their own, and so has their price; the
figures of one case are in `step_figure.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bf16prof.records import TRAINING, Component, MemoryRecord, Phase, StepRecord
from bf16prof.reports import palette
from bf16prof.reports.loss_figure import loss_curves
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text, step_ticks
from bf16prof.reports.price_figure import gap, price
from bf16prof.reports.ranks_figure import rank_peaks, rank_times
from bf16prof.reports.series import case_styles, line
from bf16prof.reports.thinning import thinned
from bf16prof.reports.units import AS_PRINTED, EXACT, gib, scale, seconds, signed_percent, whole
from bf16prof.reports.views import CaseView, bound, component_name, step_times

_HEADER = 1.15
_BAR = 0.82
"""Width of a bar, as rows are 1 apart; Plotly would go by the distance of bars, and a case may have one only."""


def all_figures(views: Sequence[CaseView]) -> dict[str, Figure | None]:
    """Every figure by the name of its section; None where the views have no data for it."""
    makers: dict[str, Callable[[Sequence[CaseView]], Figure | None]] = {
        "components": components,
        "phases": phase_peaks,
        "timeline": timeline,
        "times": times,
        "losses": loss_curves,
        "price": price,
        "gap": gap,
        "ranks": rank_peaks,
        "rank_times": rank_times,
    }
    return {name: make(views) for name, make in makers.items()}


def components(views: Sequence[CaseView]) -> Figure | None:
    """Memory allocated between steps as stacked bars by component: measurements solid, predictions hatched, under the case's name."""
    rows = _Rows(views, lambda view: [r for r in view.records.values() if r.components])
    if not rows.records:
        return None
    largest = max(sum(size for size in r.components.values() if size > 0) for _, _, r in rows.records)
    divisor, unit = scale(largest)
    traces = [_component_trace(c, rows, divisor) for c in Component if any(r.components.get(c) for _, _, r in rows.records)]
    traces.append(_totals_trace(rows, divisor))
    layout = rows.layout(f"allocated between steps ({unit})") | {"barmode": "relative"}
    layout["xaxis"]["range"] = [min(0, *(_least(r) / divisor for _, _, r in rows.records)), largest / divisor * 1.3]
    return figure("figure-components", traces, layout)


def _least(record: MemoryRecord) -> int:
    return sum(size for size in record.components.values() if size < 0)


def _component_trace(component: Component, rows: _Rows, divisor: int) -> Trace:
    sizes = [record.components.get(component, 0) for _, _, record in rows.records]
    predicted = [record is not view.reference for view, _, record in rows.records]
    return {
        "type": "bar",
        "orientation": "h",
        "width": _BAR,
        "name": component_name(component),
        "y": [y for _, y, _ in rows.records],
        "x": [size / divisor for size in sizes],
        "customdata": [[gib(size), whole(size), str(record.source)] for size, (_, _, record) in zip(sizes, rows.records, strict=True)],
        "hovertemplate": f"{component_name(component)}, %{{customdata[2]}}<br>%{{customdata[0]}} (%{{customdata[1]}} B)<extra></extra>",
        "marker": {
            "color": palette.COMPONENTS[component],
            "line": {"width": 1, "color": "#fff"},
            "pattern": {
                "shape": ["/" if p else "" for p in predicted],
                "fillmode": "overlay",
                "fgcolor": "#fff",
                "fgopacity": 0.45,
                "size": 6,
                "solidity": 0.22,
            },
        },
    }


def _totals_trace(rows: _Rows, divisor: int) -> Trace:
    ends = [sum(size for size in record.components.values() if size > 0) / divisor for _, _, record in rows.records]
    return {
        "type": "scatter",
        "mode": "text",
        "x": ends,
        "y": [y for _, y, _ in rows.records],
        "text": [f" {_verdict(view, record) or gib(record.allocated_bytes)}" for view, _, record in rows.records],
        "textposition": "middle right",
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def _verdict(view: CaseView, record: MemoryRecord) -> str:
    line = view.line("allocated_bytes")
    if line is None or record.source not in line.differences:
        return ""
    if line.as_printed(record.source):
        return AS_PRINTED
    return EXACT if line.differences[record.source] == 0 else signed_percent(line.errors[record.source])


def phase_peaks(views: Sequence[CaseView]) -> Figure | None:
    """The peak of each phase as a symbol on the case's line: filled where measured, open where predicted."""
    rows = _Rows(views, lambda view: [r for r in view.records.values() if any(m.peak_bytes is not None for m in r.phases.values())])
    peaks = [m.peak_bytes for _, _, r in rows.records for m in r.phases.values() if m.peak_bytes is not None]
    if not peaks:
        return None
    divisor, unit = scale(max(peaks))
    traces = [trace for phase in Phase if (trace := _phase_trace(phase, rows, divisor))]
    layout = rows.layout(f"peak allocated ({unit})")
    layout["xaxis"]["rangemode"] = "tozero"
    return figure("figure-phases", traces, layout)


def _phase_trace(phase: Phase, rows: _Rows, divisor: int) -> Trace | None:
    colour, symbol, _ = palette.PHASES[phase]
    points = [
        (view, y, record, memory.peak_bytes)
        for view, y, record in rows.records
        if (memory := record.phases.get(phase)) and memory.peak_bytes is not None
    ]
    if not points:
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        "name": str(phase),
        "x": [peak / divisor for _, _, _, peak in points],
        "y": [y for _, y, _, _ in points],
        "customdata": [[bound(r, f"phases.{phase}.peak_bytes") + gib(peak), whole(peak), str(r.source)] for _, _, r, peak in points],
        "hovertemplate": f"{phase}, %{{customdata[2]}}<br>%{{customdata[0]}} (%{{customdata[1]}} B)<extra></extra>",
        "marker": {
            "color": colour,
            "size": 11,
            "symbol": [symbol if record is view.reference else f"{symbol}-open" for view, _, record, _ in points],
            "line": {"width": 1.5, "color": colour},
        },
    }


def timeline(views: Sequence[CaseView]) -> Figure | None:
    """Allocated memory over the measured steps: the peak of each phase, then what is left at the end of the step."""
    curves = [(i, view, thinned(_timeline_points(view.main.steps), lambda point: point[1])) for i, view in enumerate(views)]
    known = [size for _, _, points in curves for _, size, _ in points]
    if not known:
        return None
    divisor, unit = scale(max(known))
    styles = case_styles(views)
    traces = [
        line(i, styles[i], [x for x, _, _ in points], [size / divisor for _, size, _ in points])
        | {
            "customdata": [[gib(size), what] for _, size, what in points],
            "hovertemplate": "%{fullData.name}<br>%{customdata[1]}: %{customdata[0]}<extra></extra>",
            "name": plotly_text(view.label),
        }
        for i, view, points in curves
        if points
    ]
    layout = base_layout(360, "step", f"allocated ({unit})")
    layout["xaxis"] |= step_ticks(x for _, _, points in curves for x, _, _ in points)
    return figure("figure-timeline", traces, layout)


def _timeline_points(steps: Iterable[StepRecord]) -> list[tuple[float, int, str]]:
    points: list[tuple[float, int, str]] = []
    for step in steps:
        for position, phase in enumerate(TRAINING):
            memory = step.phases.get(phase)
            if memory is not None and memory.peak_bytes is not None:
                points.append((step.step + position / 4, memory.peak_bytes, f"step {step.step}, {phase} peak"))
        if step.allocated_bytes is not None:
            points.append((step.step + 3 / 4, step.allocated_bytes, f"step {step.step}, at its end"))
    return points


def times(views: Sequence[CaseView]) -> Figure | None:
    """Seconds of every step as a dot on the case's line (warm-up steps open), the median as a tall mark."""
    rows = _Rows(views, lambda view: [view.main] if step_times(view.main) or view.main.step_time_s is not None else [])
    if not rows.records:
        return None
    traces = [_dots_trace(rows, warmup) for warmup in (False, True)]
    medians = [(y, r.step_time_s) for _, y, r in rows.records if r.step_time_s is not None]
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "median",
            "x": [value for _, value in medians],
            "y": [y for y, _ in medians],
            "customdata": [seconds(value) for _, value in medians],
            "hovertemplate": "median %{customdata}<extra></extra>",
            "marker": {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": palette.series(5)}},
        }
    )
    layout = rows.layout("seconds per step")
    layout["xaxis"]["rangemode"] = "tozero"
    return figure("figure-times", traces, layout)


def _dots_trace(rows: _Rows, warmup: bool) -> Trace:
    points = [
        (y, step, time)
        for _, y, record in rows.records
        for step, time, _ in thinned([found for found in step_times(record) if found[2] is warmup], lambda found: found[1])
    ]
    kind = "warm-up step" if warmup else "step"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "x": [time for _, _, time in points],
        "y": [y for y, _, _ in points],
        "customdata": [[step, seconds(time)] for _, step, time in points],
        "hovertemplate": f"{kind} %{{customdata[0]}}: %{{customdata[1]}}<extra></extra>",
        "marker": {"symbol": "circle-open" if warmup else "circle", "size": 8, "color": palette.series(0), "opacity": 0.6},
    }


class _Rows:
    """A vertical axis on which each case has a heading and, under it, one row per record. `records` is (view, y, record)."""

    def __init__(self, views: Sequence[CaseView], choose: Callable[[CaseView], list[MemoryRecord]]) -> None:
        self.records: list[tuple[CaseView, float, MemoryRecord]] = []
        self._headings: list[tuple[float, str]] = []
        y = 0.0
        for view in views:
            chosen = choose(view)
            if not chosen:
                continue
            self._headings.append((y, view.label))
            y += 0.85
            for record in chosen:
                self.records.append((view, y, record))
                y += 1
            y += _HEADER - 0.85
        self._end = y

    def layout(self, title: str) -> dict[str, Any]:
        layout = base_layout(int(self._end * 26 + 88), title, "")
        layout["yaxis"] |= {
            "range": [self._end - 0.4, -0.6],
            "tickvals": [y for _, y, _ in self.records],
            "ticktext": [str(record.source) for _, _, record in self.records],
            "showgrid": False,
            "fixedrange": True,
            "zeroline": False,
            "ticklabelstandoff": 6,
        }
        layout["annotations"] = [
            {"x": 0, "xref": "paper", "xanchor": "left", "y": y, "text": f"<b>{plotly_text(label)}</b>", "showarrow": False}
            for y, label in self._headings
        ]
        layout["hovermode"] = "closest"
        return layout
