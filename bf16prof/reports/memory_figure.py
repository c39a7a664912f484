"""Where the bytes are at the peak, against the GPU's line: a thick bar of components per record,
with the steady state as a thin one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.records import MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.chosen import nearest_the_limit
from bf16prof.reports.limit_lines import LimitLines
from bf16prof.reports.plots import Figure, Trace, figure
from bf16prof.reports.rows import Row, Rows
from bf16prof.reports.units import AS_PRINTED, EXACT, gib, scale, signed_percent, whole
from bf16prof.reports.views import CaseView, component_name, total_text
from bf16prof.verdict import allocator_limit
from bf16prof.vocabulary import Component, Phase

MOST_CASES = 12
"""So many cases are drawn; a larger grid has its map and its table."""

_PEAK, _STEADY, _BELOW = 0.5, 0.16, 0.37
"""The widths of both bars, and how far the thin one lies below."""


def memory(views: Sequence[CaseView]) -> Figure | None:
    """The peak of each record by component, its steady state beside it, and what the allocator may
    hold."""
    shown = nearest_the_limit(views, MOST_CASES)
    rows = Rows(shown, lambda view: [r for r in view.records.values() if highest(r)], pixels=38)
    if not rows.records:
        return None
    most = max(highest(row.record) for row in rows.records)
    drawing = _Drawing(rows, *scale(most))
    limits = LimitLines(rows, drawing.divisor, most)
    layout = rows.layout(f"allocated ({drawing.unit})") | {"barmode": "relative", "shapes": limits.lines()}
    layout["annotations"] += limits.words()
    layout["xaxis"]["range"] = [0, limits.end]
    left = f" {len(shown)} of {len(views)} cases: those whose peak comes nearest to the limit." if len(shown) < len(views) else ""
    title = "Memory at the peak, by component, against the GPU's limit"
    return figure("figure-memory", drawing.traces(), layout, title, _words(rows.records) + left)


def highest(record: MemoryRecord) -> int:
    """The most bytes that a record has to draw."""
    return max(record.peak_allocated_bytes or 0, record.run_peak_allocated_bytes or 0, record.allocated_bytes or 0)


def _words(rows: Sequence[Row]) -> str:
    said = []
    for view, _, record in rows[:24]:
        limit = allocator_limit(record)
        room = f" of {gib(limit)}" if limit is not None else ""
        peak = total_text(record, "peak_allocated_bytes") if record.peak_allocated_bytes is not None else "not known"
        said.append(f"{view.label}, {record.source}: peak {peak}{room}, between steps {gib(record.allocated_bytes)}")
    return "; ".join(said) + "."


@dataclass(frozen=True)
class _Drawing:
    """Rows on their way into a figure, in the unit of its axis."""

    rows: Rows
    divisor: int
    unit: str

    def traces(self) -> list[Trace]:
        """One bar per component, one for what nobody tells apart, the texts at the ends, and marks
        at peaks of init."""
        bars = [self._bars(c) for c in Component if any(_at_peak(r).get(c) or r.components.get(c) for *_, r in self.rows.records)]
        return [*bars, *self._untold(), self._texts(), *self._init()]

    def _bars(self, component: Component) -> Trace:
        name = component_name(component)
        found = [(row, _at_peak(row.record).get(component, 0), row.record.components.get(component, 0)) for row in self.rows.records]
        bars = [
            bar
            for (view, y, record), peak, steady in found
            for bar in ((view, y, record, peak, "at the peak", _PEAK), (view, y + _BELOW, record, steady, "between steps", _STEADY))
            if bar[3]
        ]
        pattern = {"fillmode": "overlay", "fgcolor": "#fff", "fgopacity": 0.45, "size": 6, "solidity": 0.22}
        return {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [y for _, y, *_ in bars],
            "x": [size / self.divisor for *_, size, _, _ in bars],
            "width": [width for *_, width in bars],
            "customdata": [[gib(size), whole(size), f"{record.source}, {instant}"] for _, _, record, size, instant, _ in bars],
            "hovertemplate": f"{name}, %{{customdata[2]}}<br>%{{customdata[0]}} (%{{customdata[1]}} B)<extra></extra>",
            "marker": {
                "color": palette.COMPONENTS[component],
                "line": {"width": 1, "color": "#fff"},
                "pattern": pattern | {"shape": ["" if record is view.reference else "/" for view, _, record, *_ in bars]},
            },
        }

    def _untold(self) -> list[Trace]:
        """Peaks of which only the sum is known."""
        bars = [(y, r, r.peak_allocated_bytes) for _, y, r in self.rows.records if r.peak_allocated_bytes and not _at_peak(r)]
        if not bars:
            return []
        return [
            {
                "type": "bar",
                "orientation": "h",
                "name": "peak, not told apart",
                "y": [y for y, *_ in bars],
                "x": [size / self.divisor for *_, size in bars],
                "width": _PEAK,
                "customdata": [[gib(size), whole(size), str(record.source)] for _, record, size in bars],
                "hovertemplate": "at the peak, not told apart, %{customdata[2]}<br>%{customdata[0]} (%{customdata[1]} B)<extra></extra>",
                "marker": {"color": palette.UNTOLD, "line": {"width": 1, "color": "#fff"}},
            }
        ]

    def _texts(self) -> Trace:
        ends = [(highest(record) / self.divisor, y, f" {_peak_text(view, record)}") for view, y, record in self.rows.records]
        return {
            "type": "scatter",
            "mode": "text",
            "x": [x for x, *_ in ends],
            "y": [y for _, y, _ in ends],
            "text": [text for *_, text in ends],
            "textposition": "middle right",
            "hoverinfo": "skip",
            "cliponaxis": False,
        }

    def _init(self) -> list[Trace]:
        """Where init, before training, is higher than all of training."""
        higher = [(r.run_peak_allocated_bytes, y) for _, y, r in self.rows.records if _is_of_init(r)]
        if not higher:
            return []
        return [
            {
                "type": "scatter",
                "mode": "markers",
                "name": "peak of init",
                "x": [(size or 0) / self.divisor for size, _ in higher],
                "y": [y for _, y in higher],
                "customdata": [gib(size) for size, _ in higher],
                "hovertemplate": "peak of the whole run, in init: %{customdata}<extra></extra>",
                "marker": {"symbol": "line-ns", "size": 16, "line": {"width": 3, "color": palette.PHASES[Phase.INIT][0]}},
            }
        ]


def _is_of_init(record: MemoryRecord) -> bool:
    return record.peak_allocated_bytes is not None and (record.run_peak_allocated_bytes or 0) > record.peak_allocated_bytes


def _at_peak(record: MemoryRecord) -> Mapping[Component, int]:
    return record.peak_components if record.peak_allocated_bytes is not None else {}


def _peak_text(view: CaseView, record: MemoryRecord) -> str:
    """The peak, and by how much a prediction misses it: "31.39 GiB, exact"."""
    if record.peak_allocated_bytes is None:
        return f"{gib(highest(record))}" + ("" if record.run_peak_allocated_bytes else " between steps; the peak is not known")
    text = total_text(record, "peak_allocated_bytes")
    line = view.line("peak_allocated_bytes")
    if line is None or record.source not in line.differences:
        return text
    if line.as_printed(record.source):
        return f"{text}, {AS_PRINTED}"
    return f"{text}, {EXACT if line.differences[record.source] == 0 else signed_percent(line.errors[record.source])}"
