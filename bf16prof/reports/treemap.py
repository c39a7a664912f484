"""What is alive at the training peak as a map: the area of each component, and in it of each of its tensors, is its share of the bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.records import Component, Item, MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text
from bf16prof.reports.units import gib, inert, share
from bf16prof.reports.views import component_name

_WIDTH, _HEIGHT = 100.0, 36.0
_PIXELS = 380
_LETTER, _LINE = 0.72, 1.75
"""The width of a letter and the height of a line, of a map so wide and high on a page of 1,100 pixels."""

_SMALLEST = 0.0005
"""Tensors below this share of all bytes are drawn as one."""

_GAP = 0.12


@dataclass(frozen=True)
class _Box:
    """A rectangle of the map."""

    x: float
    y: float
    width: float
    height: float


def treemap(id_: str, record: MemoryRecord) -> Figure | None:
    """The map of a record's training peak; `None` where its tensors have no names."""
    items = _drawn(record.peak_items)
    if not items:
        return None
    total = sum(item.bytes for item in items)
    traces: list[Trace] = []
    words: list[dict[str, Any]] = []
    for component, box in _components(items):
        own = sorted((item for item in items if item.component is component), key=lambda item: -item.bytes)
        for item, inner in zip(own, _boxes([item.bytes for item in own], box), strict=True):
            traces.append(_trace(item, inner, total))
            words += _words(item, inner, palette.COMPONENTS[component])
    layout = base_layout(_PIXELS, "", "")
    axis = {"visible": False, "fixedrange": True, "automargin": False, "title": None}
    layout["xaxis"] |= axis | {"range": [0, _WIDTH]}
    layout["yaxis"] |= axis | {"range": [_HEIGHT, 0]}
    layout |= {"annotations": words, "hovermode": "closest", "margin": {"l": 0, "r": 0, "t": 4, "b": 4}}
    said = "; ".join(f"{_name(item)} {gib(item.bytes)}" for item in sorted(items, key=lambda item: -item.bytes)[:12])
    return figure(id_, traces, layout, "What is alive at the training peak", said)


def _drawn(items: Sequence[Item]) -> list[Item]:
    """The items to draw: of each component the small ones as one."""
    total = sum(item.bytes for item in items)
    large = [item for item in items if item.bytes > total * _SMALLEST]
    for component in Component:
        rest = [item for item in items if item.component is component and 0 < item.bytes <= total * _SMALLEST]
        if rest and (size := sum(item.bytes for item in rest)) > total * _SMALLEST:
            large.append(Item(component, f"{len(rest)} smaller ones", size))
    return large


def _components(items: Sequence[Item]) -> Iterator[tuple[Component, _Box]]:
    sizes = {c: sum(item.bytes for item in items if item.component is c) for c in dict.fromkeys(item.component for item in items)}
    ordered = sorted(sizes.items(), key=lambda pair: -pair[1])
    boxes = _boxes([size for _, size in ordered], _Box(0, 0, _WIDTH, _HEIGHT))
    return zip((component for component, _ in ordered), boxes, strict=True)


def _boxes(sizes: Sequence[int], box: _Box) -> list[_Box]:
    """Rectangles of these areas, biggest first, as near to squares as they come."""
    import squarify

    areas = squarify.normalize_sizes(sizes, box.width, box.height)
    return [_Box(r["x"], r["y"], r["dx"], r["dy"]) for r in squarify.squarify(areas, box.x, box.y, box.width, box.height)]


def _trace(item: Item, box: _Box, total: int) -> Trace:
    left, right, top, bottom = box.x + _GAP, box.x + box.width - _GAP, box.y + _GAP, box.y + box.height - _GAP
    text = f"{component_name(item.component)}<br>{plotly_text(_name(item))}<br>{gib(item.bytes)}, {share(item.bytes, total)}"
    return {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "hoveron": "fills",
        "hoverinfo": "text",
        "text": text + (f"<br>{plotly_text(inert(item.source))}" if item.source else ""),
        "x": [left, right, right, left, left],
        "y": [top, top, bottom, bottom, top],
        "line": {"width": 0},
        "fillcolor": palette.COMPONENTS[item.component],
    }


def _words(item: Item, box: _Box, colour: str) -> list[dict[str, Any]]:
    """The name and the size in the rectangle, as far as there is room; nothing where there is not."""
    name, size = _name(item), gib(item.bytes)
    letters, lines = int((box.width - 1) / _LETTER), int((box.height - 0.4) / _LINE)
    if letters < len(size) or not lines:
        return []
    short = name if len(name) <= letters else name[: letters - 1] + "…"
    one_line = f"{plotly_text(name)} {size}" if len(name) + len(size) < letters else size
    text = f"{plotly_text(short)}<br>{size}" if lines > 1 else one_line
    where = {"x": box.x + 0.5, "y": box.y + 0.3, "xanchor": "left", "yanchor": "top", "align": "left", "showarrow": False}
    return [{"text": text, "font": {"color": palette.on(colour), "size": 11}, **where}]


def _name(item: Item) -> str:
    return inert(item.name, 60)
