"""The memory of one optimizer step, allocation by allocation: stacked by component, with the
phases, the peak and what bounds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.records import MemoryRecord, PhaseStart, Timeline
from bf16prof.reports import palette
from bf16prof.reports.plots import GROUND, Figure, Trace, base_layout, figure, plotly_text
from bf16prof.reports.units import gib, inert, scale, signed_bytes
from bf16prof.reports.views import component_name
from bf16prof.verdict import allocator_limit
from bf16prof.vocabulary import Component, Phase

_HEIGHT, _TOP = 430, 54
"""Above the axes there is a row of phases and, above them, one of Plotly's buttons."""

_HEADROOM = 1.15

_LETTER = 0.013
"""The width of a letter of a phase's name as a share of a figure 520 pixels wide; a name is written
where it has room."""

STACK = (
    Component.PARAMETERS, Component.MASTER_PARAMETERS, Component.MOMENTUM, Component.VARIANCE, Component.COMPENSATION,
    Component.GRADIENTS, Component.MASTER_GRADIENTS, Component.BUFFERS, Component.ACTIVATIONS, Component.WORKSPACE,
    Component.ROUNDING, Component.OTHER,
)  # fmt: skip
"""What stays lies below what comes and goes."""


def step_figure(id_: str, record: MemoryRecord, timeline: Timeline) -> Figure | None:
    """The timeline of a record as a figure; `None` where nothing is allocated in it."""
    totals = timeline.totals
    if not any(totals):
        return None
    drawing = _Drawing(timeline, totals, *scale(max(totals)))
    lines = _near(drawing.highest, record)
    layout = base_layout(_HEIGHT, "allocations and frees since the step began", f"allocated ({drawing.unit})")
    layout["margin"]["t"] = _TOP
    layout["xaxis"] |= {"range": [0, drawing.end], "showgrid": False, "zeroline": False, "tickformat": ",d"}
    top = max(drawing.highest, *(size for _, size, _ in lines)) if lines else drawing.highest
    layout["yaxis"]["range"] = [drawing.y(min(0, *totals)), drawing.y(top) * _HEADROOM]
    layout |= {"hovermode": "x unified", "hoverlabel": {"bgcolor": "#fff"}}
    layout["shapes"] = [*drawing.bands(), *(shape for _, size, dash in lines for shape in drawing.line(size, dash))]
    layout["annotations"] = [*drawing.phase_names(), drawing.peak_text(), *(drawing.line_text(name, size) for name, size, _ in lines)]
    return figure(id_, drawing.traces(), layout, "Allocated memory over one step", f"The peak is {gib(drawing.highest)}.")


def _near(highest: int, record: MemoryRecord) -> list[tuple[str, int, str]]:
    """(name, bytes, dash) of what the allocator has reserved and may reserve, where it lies near
    what is drawn anyway."""
    found = []
    bounds = (("most reserved", record.reserved_bytes, "dash", 2.0), ("the allocator's limit", allocator_limit(record), "solid", 1.3))
    for name, size, dash, reach in bounds:
        if size is not None and size <= highest * reach:
            found.append((name, size, dash))
            highest = max(highest, size)
    return found


@dataclass(frozen=True)
class _Drawing:
    """A timeline on its way into a figure: its total after each event, and the unit of its axis."""

    timeline: Timeline
    totals: Sequence[int]
    divisor: int
    unit: str

    @property
    def highest(self) -> int:
        """The peak, in bytes."""
        return max(self.totals)

    @property
    def at(self) -> int:
        """The event of the peak."""
        return self.timeline.events[self.totals.index(self.highest)]

    @property
    def end(self) -> int:
        """Where the axis ends: at the last event."""
        return max(1, self.timeline.events[-1])

    def y(self, size: int) -> float:
        """Bytes in the unit of the axis; three digits are finer than the screen."""
        return round(size / self.divisor, 3)

    def traces(self) -> list[Trace]:
        """One area per component, the outline of all of them with the total, and a ring at the
        peak."""
        areas = [self._area(c) for c in STACK if any(self.timeline.components.get(c, ()))]
        outline = self._line("allocated", self.totals) | {"line": {"width": 1, "color": palette.INK, "shape": "hv"}} | self._changes()
        marker = {"color": "rgba(0,0,0,0)", "size": 9, "line": {"width": 2, "color": palette.INK}}
        ring = {"type": "scatter", "mode": "markers", "x": [self.at], "y": [self.y(self.highest)], "marker": marker}
        return [*areas, outline, ring | {"hoverinfo": "skip", "cliponaxis": False}]

    def _changes(self) -> Trace:
        """What each event allocated or freed, for whoever points at it."""
        timeline = self.timeline
        if not timeline.changes:
            return {}
        names = [plotly_text(inert(name, 120)) for name in timeline.names]
        words = [f"<br>{signed_bytes(size)} {names[name]}" if size else f"<br>{names[name]}" for size, name in timeline.changes]
        return {"text": words[: len(self.totals)], "hovertemplate": f"%{{y:,.2f}} {self.unit}%{{text}}"}

    def bands(self) -> Iterator[dict[str, Any]]:
        """Grey behind every phase but backward, and a dotted line where each begins."""
        for phase, start, end in _bands(self.timeline.phases, self.end):
            band = {"xref": "x", "yref": "paper", "x0": start, "y0": 0, "y1": 1}
            if phase is not Phase.BACKWARD:
                yield band | {"type": "rect", "x1": end, "layer": "below", "fillcolor": "rgba(128,128,128,0.12)", "line": {"width": 0}}
            yield band | {"type": "line", "x1": start, "line": {"width": 1, "color": "rgba(128,128,128,0.6)", "dash": "dot"}}

    def phase_names(self) -> Iterator[dict[str, Any]]:
        """The name of each phase above it, shortened to a letter or left out where it has no
        room."""
        for phase, start, end in _bands(self.timeline.phases, self.end):
            letters = (end - start) / self.end / _LETTER
            name = str(phase) if letters >= len(phase) else phase[0].upper() if letters >= 1 else ""
            if name:
                yield {"text": name, "showarrow": False, "x": (start + end) / 2, "y": 1, "yref": "paper", "yanchor": "bottom"}

    def peak_text(self) -> dict[str, Any]:
        """The bytes of the peak, over it."""
        side = "left" if self.at < self.end / 3 else "right" if self.at > self.end * 2 / 3 else "center"
        where = {"x": self.at, "xanchor": side, "y": self.y(self.highest), "yanchor": "bottom", "yshift": 6}
        return {"text": f"peak {gib(self.highest)}", "showarrow": False, "bgcolor": GROUND, **where}

    def line(self, size: int, dash: str) -> Iterator[dict[str, Any]]:
        """A horizontal line at a number of bytes, on a lighter one that sets it off from the
        areas."""
        across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": self.y(size), "y1": self.y(size)}
        if dash == "solid":
            yield across | {"line": {"width": 5, "color": GROUND}}
        yield across | {"line": {"width": 1.5, "color": palette.LIMIT if dash == "solid" else palette.INK, "dash": dash}}

    def line_text(self, name: str, size: int) -> dict[str, Any]:
        """What a line means, on the side where the peak is not."""
        side, x = ("left", 0) if self.at > self.end / 2 else ("right", 1)
        where = {"x": x, "xref": "paper", "xanchor": side, "y": self.y(size), "yanchor": "bottom"}
        return {"text": f"{name} {gib(size)}", "showarrow": False, "bgcolor": GROUND, **where}

    def _area(self, component: Component) -> Trace:
        area = {"stackgroup": "components", "fillcolor": palette.COMPONENTS[component], "line": {"width": 0, "shape": "hv"}}
        return self._line(component_name(component), self.timeline.components[component]) | area

    def _line(self, name: str, sizes: Sequence[int]) -> Trace:
        return {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": self.timeline.events[: len(self.totals)],
            "y": [self.y(size) for size in sizes[: len(self.totals)]],
            "hovertemplate": f"%{{y:,.2f}} {self.unit}",
        }


def _bands(phases: Sequence[PhaseStart], end: int) -> Iterator[tuple[Phase, int, int]]:
    """(phase, first event, event before which the next begins) of every phase that is not empty."""
    starts = sorted(phases, key=lambda start: start.event)
    for start, following in zip(starts, [*(later.event for later in starts[1:]), end], strict=False):
        if start.event < min(following, end):
            yield start.phase, start.event, min(following, end)
