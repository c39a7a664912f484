"""The figure that sets bytes beside learning: every case as a point, measured model states per parameter against EDQ."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.records import Component, MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.learning import Learning, edq_text, learning, lost_text
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


def price(views: Sequence[CaseView]) -> Figure | None:
    """One point per case that knows its EDQ; the colour says the recipe."""
    recipes = list(dict.fromkeys(view.case.recipe for view in views))
    traces = [
        _point(view, size, found, palette.series(recipes.index(view.case.recipe)))
        for view in views
        if (found := learning(view.main)) and found.edq is not None and (size := states_per_parameter(view.main)) is not None
    ]
    if not traces:
        return None
    layout = base_layout(380, "bytes of model states per parameter and rank, between steps", "EDQ")
    layout["xaxis"]["rangemode"] = "tozero"
    layout["hovermode"] = "closest"
    return figure("figure-price", traces, layout)


def _point(view: CaseView, size: float, found: Learning, colour: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [size],
        "y": [found.edq],
        "text": [plotly_text(view.case.recipe)],
        "textposition": "top center",
        "cliponaxis": False,
        "name": plotly_text(view.label),
        "customdata": [[number(size), edq_text(found.edq), lost_text(found.lost_updates), number(found.loss)]],
        "hovertemplate": "%{fullData.name}<br>%{customdata[0]} bytes per parameter<br>EDQ %{customdata[1]}, %{customdata[2]} of updates "
        "lost<br>loss %{customdata[3]}<extra></extra>",
        "marker": {"size": 10, "color": colour},
    }
