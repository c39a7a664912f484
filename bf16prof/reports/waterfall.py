"""From the prediction to the measurement: which component is how much more or less, one step after
the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bf16prof.records import MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.plots import Figure, Trace, base_layout, figure
from bf16prof.reports.units import gib, scale, signed_bytes, whole
from bf16prof.reports.views import component_name
from bf16prof.vocabulary import Component


@dataclass(frozen=True)
class _Step:
    """What one component adds to the difference so far."""

    name: str
    before: int
    difference: int
    colour: str


def waterfall(id_: str, predicted: MemoryRecord, measured: MemoryRecord) -> Figure | None:
    """The differences of what is allocated between steps, component by component; `None` where
    there are none, or they are not known."""
    steps = list(_steps(predicted, measured))
    if not steps:
        return None
    total = sum(step.difference for step in steps)
    reach = max(max(abs(step.before), abs(step.before + step.difference)) for step in steps)
    divisor, unit = scale(reach)
    layout = base_layout(int(len(steps) * 26 + 116), f"{measured.source} - {predicted.source}, allocated between steps ({unit})", "")
    names = [step.name for step in steps]
    layout["yaxis"] |= {"autorange": "reversed", "type": "category", "showgrid": False, "fixedrange": True, "ticklabelstandoff": 6}
    layout |= {"hovermode": "closest", "bargap": 0.35}
    layout["margin"]["r"] = 90
    texts = [signed_bytes(step.difference) for step in steps]
    ends = f"{predicted.source} {gib(predicted.allocated_bytes)}, {measured.source} {gib(measured.allocated_bytes)}"
    traces = [_bars(steps, divisor, texts), _sum(total, divisor)]
    words = f"{ends}: " + ", ".join(f"{name} {text}" for name, text in zip(names, texts, strict=True))
    return figure(id_, traces, layout, f"From {predicted.source} to {measured.source}: {signed_bytes(total)}", words)


def is_off(predicted: MemoryRecord, measured: MemoryRecord) -> bool:
    """Whether there is anything to draw."""
    return next(_steps(predicted, measured), None) is not None


def _steps(predicted: MemoryRecord, measured: MemoryRecord) -> Iterator[_Step]:
    if not predicted.components or not measured.components:
        return
    reached = 0
    for component in Component:
        difference = measured.components.get(component, 0) - predicted.components.get(component, 0)
        if difference:
            yield _Step(component_name(component), reached, difference, palette.COMPONENTS[component])
            reached += difference


def _bars(steps: list[_Step], divisor: int, texts: list[str]) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "y": [step.name for step in steps],
        "x": [step.difference / divisor for step in steps],
        "base": [step.before / divisor for step in steps],
        "text": texts,
        "textposition": "outside",
        "cliponaxis": False,
        "customdata": [f"{whole(step.difference)} B" for step in steps],
        "hovertemplate": "%{y}: %{text} (%{customdata})<extra></extra>",
        "marker": {"color": [step.colour for step in steps]},
    }


def _sum(total: int, divisor: int) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "y": ["all together"],
        "x": [total / divisor],
        "text": [signed_bytes(total)],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "all together: %{text}<extra></extra>",
        "marker": {"color": palette.INK},
    }
