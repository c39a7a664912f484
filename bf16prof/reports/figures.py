"""The figures of the HTML report that show all cases in one: peaks by phase, steps and step times.

They keep the rules of `plots.py`. What the peak is made of, losses and their price have modules of
their own (`memory_figure.py`, `loss_figure.py`, `price_figure.py`), and so have the figures of one
case (`step_panels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from bf16prof.records import MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.chosen import nearest_the_limit
from bf16prof.reports.limit_lines import LimitLines
from bf16prof.reports.loss_figure import loss_curves, loss_differences
from bf16prof.reports.memory_figure import MOST_CASES, memory
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text, step_ticks
from bf16prof.reports.price_figure import gap, price
from bf16prof.reports.ranks_figure import rank_peaks, rank_times
from bf16prof.reports.rows import Rows
from bf16prof.reports.series import case_styles, line
from bf16prof.reports.thinning import thinned
from bf16prof.reports.units import gib, scale, seconds, whole
from bf16prof.reports.views import CaseView, bound, step_times
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import TRAINING, Phase


def all_figures(views: Sequence[CaseView]) -> dict[str, Figure | None]:
    """Every figure by the name of its section; None where the views have no data for it."""
    makers: dict[str, Callable[[Sequence[CaseView]], Figure | None]] = {
        "memory": memory,
        "phases": phase_peaks,
        "timeline": timeline,
        "times": times,
        "losses": loss_curves,
        "differences": loss_differences,
        "price": price,
        "gap": gap,
        "ranks": rank_peaks,
        "rank_times": rank_times,
    }
    return {name: make(views) for name, make in makers.items()}


def phase_peaks(views: Sequence[CaseView]) -> Figure | None:
    """The peak of each phase as a symbol on the case's line: filled where measured, open where
    predicted."""
    shown = nearest_the_limit(views, MOST_CASES)
    rows = Rows(shown, lambda view: [r for r in view.records.values() if any(m.peak_bytes is not None for m in r.phases.values())])
    peaks = [m.peak_bytes for _, _, r in rows.records for m in r.phases.values() if m.peak_bytes is not None]
    if not peaks:
        return None
    divisor, unit = scale(max(peaks))
    traces = [trace for phase in Phase if (trace := _phase_trace(phase, rows, divisor))]
    limits = LimitLines(rows, divisor, max(peaks))
    layout = rows.layout(f"peak allocated ({unit})") | {"shapes": limits.lines()}
    layout["annotations"] += limits.words()
    layout["xaxis"]["range"] = [0, limits.end]
    words = "; ".join(f"{view.label}, {record.source}: {_phases_in_words(record)}" for view, _, record in rows.records[:24])
    return figure("figure-phases", traces, layout, "Peaks by phase, against the GPU's limit", words)


def _phases_in_words(record: MemoryRecord) -> str:
    return ", ".join(f"{phase} {gib(memory.peak_bytes)}" for phase, memory in record.phases.items() if memory.peak_bytes is not None)


def _phase_trace(phase: Phase, rows: Rows, divisor: int) -> Trace | None:
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
    """Allocated memory over the measured steps: the peak of each phase, then what is left at the
    end of the step."""
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
    words = "; ".join(f"{view.label}: {len(points)} points, up to {gib(max(p[1] for p in points))}" for _, view, points in curves if points)
    return figure("figure-timeline", traces, layout, "Allocated memory over the steps", words)


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
    """Seconds of every step as a dot on the case's line (warm-up steps open), the median as a tall
    mark."""
    rows = Rows(views, lambda view: [view.main] if step_times(view.main) or view.main.step_time_s is not None else [])
    if not rows.records:
        return None
    colours = {id(view): colour for view, (colour, _) in zip(views, case_styles(views), strict=True)}
    traces = [_dots_trace(rows, colours, warmup) for warmup in (False, True)]
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
            "marker": {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": palette.INK}},
        }
    )
    layout = rows.layout("seconds per step")
    layout["xaxis"]["rangemode"] = "tozero"
    said = [f"{view.label}: median {seconds(record.step_time_s)}" for view, _, record in rows.records if record.step_time_s is not None]
    return figure("figure-times", traces, layout, "Seconds per step", "; ".join(said[:24]))


def _dots_trace(rows: Rows, colours: Mapping[int, str], warmup: bool) -> Trace:
    points = [
        (y, step, time, colours[id(view)])
        for view, y, record in rows.records
        for step, time, _ in thinned([found for found in step_times(record) if found[2] is warmup], lambda found: found[1])
    ]
    kind = "warm-up step" if warmup else "step"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "x": [time for _, _, time, _ in points],
        "y": [y for y, *_ in points],
        "customdata": [[step, seconds(time)] for _, step, time, _ in points],
        "hovertemplate": f"{kind} %{{customdata[0]}}: %{{customdata[1]}}<extra></extra>",
        "marker": {"symbol": "circle-open" if warmup else "circle", "size": 8, "color": [c for *_, c in points], "opacity": 0.7},
    }
