"""The figures that set bytes beside learning: every case as a point, measured model states per parameter against EDQ and loss gap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from bf16prof.records import Component, MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.intervals import Interval, t_interval
from bf16prof.reports.learning import edq_text, learning, lost_text
from bf16prof.reports.losses import LossGap, SeedGroup, loss_gaps, seed_groups
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text
from bf16prof.reports.units import number
from bf16prof.reports.views import CaseView

MODEL_STATES = (
    Component.PARAMETERS, Component.GRADIENTS, Component.MASTER_PARAMETERS, Component.MASTER_GRADIENTS, Component.MOMENTUM,
    Component.VARIANCE, Component.COMPENSATION,
)  # fmt: skip


def states_per_parameter(record: MemoryRecord) -> float | None:
    """Bytes that a rank holds of the model's states between steps, over the model's parameters; `None` where they are not known."""
    if not record.components or not record.parameters:
        return None
    return sum(record.components.get(component, 0) for component in MODEL_STATES) / record.parameters


def learned(group: SeedGroup, quantity: Literal["edq", "lost_updates", "loss"]) -> Interval | None:
    """The mean of what a group learned, over its seeds; `None` where it was not watched."""
    values = [value for view in group.views if (found := learning(view.main)) and (value := getattr(found, quantity)) is not None]
    return t_interval(values) if values else None


def price(views: Sequence[CaseView]) -> Figure | None:
    """One point per case that knows its EDQ; the colour says the recipe."""
    groups = seed_groups(views)
    traces = [
        _point(group, groups, size, edq, [edq_text(edq.mean), lost_text(lost.mean), _last_loss(group)])
        | {"hovertemplate": _HOVER + "<br>EDQ %{customdata[1]}, %{customdata[2]} of updates lost<br>loss %{customdata[3]}<extra></extra>"}
        for group in groups
        if (edq := learned(group, "edq")) and (lost := learned(group, "lost_updates")) and (size := _states(group)) is not None
    ]
    return figure("figure-price", _apart(traces), _layout("EDQ")) if traces else None


def gap(views: Sequence[CaseView]) -> Figure | None:
    """One point per case whose loss gap to a reference is known, and the references at 0."""
    groups = seed_groups(views)
    found = loss_gaps(groups)
    references = {id(gap.reference): LossGap(gap.reference, gap.reference, Interval(0.0, None, 1)) for gap in found}
    traces = [
        _point(gap.group, groups, size, gap.gap, [gap.gap.text(4), gap.reference.label])
        | {"hovertemplate": _HOVER + "<br>loss %{customdata[1]} to %{customdata[2]}<extra></extra>"}
        for gap in (*references.values(), *found)
        if (size := _states(gap.group)) is not None
    ]
    names = ", ".join(plotly_text(name) for name in dict.fromkeys(gap.reference.recipe for gap in found))
    return figure("figure-gap", _apart(traces), _layout(f"loss gap to {names}")) if found and traces else None


_HOVER = "%{fullData.name}<br>%{customdata[0]} bytes per parameter"


def _states(group: SeedGroup) -> float | None:
    return states_per_parameter(group.views[0].main)


def _last_loss(group: SeedGroup) -> str:
    loss = learned(group, "loss")
    return number(loss.mean if loss else None)


def _apart(points: Sequence[Trace]) -> list[Trace]:
    """The points with the names of those above one another in different places."""
    seen: Counter[float] = Counter()
    placed = []
    for point in points:
        (x,) = point["x"]
        placed.append(point | {"textposition": _PLACES[seen[x] % len(_PLACES)]})
        seen[x] += 1
    return placed


_PLACES = ("top center", "bottom center", "middle right", "middle left")


def _layout(y_title: str) -> dict[str, Any]:
    layout = base_layout(380, "bytes of model states per parameter and rank, between steps", y_title)
    layout["xaxis"]["rangemode"] = "tozero"
    layout["hovermode"] = "closest"
    return layout


def _point(group: SeedGroup, groups: Sequence[SeedGroup], x: float, y: Interval, more: Sequence[str]) -> Trace:
    recipes = list(dict.fromkeys(other.recipe for other in groups))
    bar = {"error_y": {"type": "data", "array": [y.half_width], "thickness": 1}} if y.half_width is not None else {}
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [x],
        "y": [y.mean],
        "text": [plotly_text(group.recipe)],
        "cliponaxis": False,
        "name": plotly_text(group.label),
        "customdata": [[number(x), *map(plotly_text, more)]],
        "marker": {"size": 10, "color": palette.series(recipes.index(group.recipe))},
        **bar,
    }
