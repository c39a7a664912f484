"""The figures that set bytes beside learning: every case as a point, measured model states per
parameter against EDQ and loss gap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bf16prof.records import MemoryRecord
from bf16prof.reports.intervals import Interval, t_interval
from bf16prof.reports.learning import edq_text, learning, lost_text
from bf16prof.reports.losses import LossGap, SeedGroup, loss_gaps, seed_groups
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text
from bf16prof.reports.series import case_styles
from bf16prof.reports.units import inert, number
from bf16prof.reports.views import CaseView, case_label
from bf16prof.vocabulary import Component

MODEL_STATES = (
    Component.PARAMETERS, Component.GRADIENTS, Component.MASTER_PARAMETERS, Component.MASTER_GRADIENTS, Component.MOMENTUM,
    Component.VARIANCE, Component.COMPENSATION,
)  # fmt: skip


def states_per_parameter(record: MemoryRecord) -> float | None:
    """Bytes that a rank holds of the model's states between steps, over the model's parameters;
    `None` where they are not known."""
    if not record.components or not record.parameters:
        return None
    return sum(record.components.get(component, 0) for component in MODEL_STATES) / record.parameters


def learned(group: SeedGroup, quantity: Literal["edq", "lost_updates", "loss"]) -> Interval | None:
    """The mean of what a group learned, over its seeds; `None` where it was not watched, or one of
    them does not know it."""
    values = [getattr(found, quantity) for view in group.views if (found := learning(view.main))]
    return t_interval(values) if values and None not in values else None


def price(views: Sequence[CaseView]) -> Figure | None:
    """One point per case that knows its EDQ; the colour says the recipe, the symbol everything
    else."""
    points = [
        _Point(group, size, edq, (edq_text(edq.mean), lost_text(lost.mean), _last_loss(group)))
        for group in seed_groups(views)
        if (edq := learned(group, "edq")) and (lost := learned(group, "lost_updates")) and (size := _states(group)) is not None
    ]
    hover = f"{_HOVER}<br>EDQ %{{customdata[1]}}, %{{customdata[2]}} of updates lost<br>loss %{{customdata[3]}}<extra></extra>"
    return _figure("figure-price", points, views, hover, ("EDQ", "Bytes against the learning that takes effect")) if points else None


def gap(views: Sequence[CaseView]) -> Figure | None:
    """One point per case whose loss gap to a reference is known, and the references at 0."""
    found = loss_gaps(seed_groups(views))
    references = {id(gap.reference): LossGap(gap.reference, gap.reference, Interval(0.0, None, 1)) for gap in found}
    points = [
        _Point(gap.group, size, gap.gap, (gap.gap.text(4), gap.reference.label))
        for gap in (*references.values(), *found)
        if (size := _states(gap.group)) is not None
    ]
    names = ", ".join(plotly_text(name) for name in dict.fromkeys(gap.reference.recipe for gap in found))
    hover = f"{_HOVER}<br>loss %{{customdata[1]}} to %{{customdata[2]}}<extra></extra>"
    return _figure("figure-gap", points, views, hover, (f"loss gap to {names}", "Bytes against the loss gap")) if found and points else None


_HOVER = "%{fullData.name}<br>%{customdata[0]} bytes per parameter held by a rank"


@dataclass(frozen=True)
class _Point:
    """A group at (bytes per parameter that a rank holds, what it learned), and what is said of it
    beside that."""

    group: SeedGroup
    x: float
    y: Interval
    said: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Everything but the recipe, for the legend."""
        view = self.group.views[0]
        return self.group.label.replace(case_label(view.case), case_label(replace(view.case, recipe="")).rstrip("-").replace("--", "-"))


def _figure(name: str, points: Sequence[_Point], views: Sequence[CaseView], hover: str, titles: tuple[str, str]) -> Figure:
    """A figure, with the title of its vertical axis and its own.

    A legend explains colours and symbols; while each recipe has one point, its name stands there
    too, if the page is wide.
    """
    recipes = {point.group.recipe for point in points}
    kinds = list(dict.fromkeys(point.kind for point in points))
    colours = {view.case.recipe: colour for view, (colour, _) in zip(views, case_styles(views), strict=True) if view.case.recipe in recipes}
    symbols = {kind: _SYMBOLS[number % len(_SYMBOLS)] for number, kind in enumerate(kinds)}
    traces = [_trace(p, colours[p.group.recipe], symbols[p.kind][0]) | {"hovertemplate": hover} for p in points]
    layout = base_layout(380, "bytes of model states that a rank holds per parameter, between steps", titles[0])
    layout["xaxis"]["range"] = [0, max(point.x for point in points) * 1.15]
    layout["hovermode"] = "closest"
    if len(points) == len(recipes):
        traces = _named_apart(points, traces)
    legend = [(inert(recipe), "●", colour) for recipe, colour in colours.items()]
    legend += [(kind, symbol, "") for kind, (_, symbol) in symbols.items()] if len(kinds) > 1 else []
    words = "; ".join(f"{p.group.label}: {number(p.x)} bytes per parameter, {p.y.text(4)}" for p in points)
    return replace(figure(name, traces, layout, titles[1], words), legend=tuple(legend))


def _states(group: SeedGroup) -> float | None:
    return states_per_parameter(group.views[0].main)


def _last_loss(group: SeedGroup) -> str:
    loss = learned(group, "loss")
    return number(loss.mean if loss else None)


def _named_apart(points: Sequence[_Point], traces: Sequence[Trace]) -> list[Trace]:
    """The traces with names, those above one another in different places; on the right side to the
    left, so that they end on the page."""
    seen: Counter[float] = Counter()
    middle = max(point.x for point in points) / 2
    named = []
    for point, trace in zip(points, traces, strict=True):
        places = _PLACES if point.x <= middle else _PLACES_ON_THE_RIGHT
        place = places[seen[point.x] % len(places)]
        named.append(trace | {"mode": "markers+text", "text": [plotly_text(point.group.recipe)], "textposition": place})
        seen[point.x] += 1
    return named


_PLACES = ("top center", "bottom center", "middle right", "middle left")
_PLACES_ON_THE_RIGHT = ("top left", "bottom left", "middle left")
_SYMBOLS = (("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("cross", "✚"), ("x", "✖"), ("star", "★"))


def _trace(point: _Point, colour: str, symbol: str) -> Trace:
    width = point.y.half_width
    bar = {"error_y": {"type": "data", "array": [width], "thickness": 1}} if width is not None else {}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [point.x],
        "y": [point.y.mean],
        "cliponaxis": False,
        "name": plotly_text(point.group.label),
        "customdata": [[number(point.x), *map(plotly_text, point.said)]],
        "marker": {"size": 10, "color": colour, "symbol": symbol, "opacity": 0.8},
        **bar,
    }
