"""What is alive at the training peak as a map: the area of each group, and in it of each of its
parts, is its share of the bytes.

Groups are components, whose parts are tensors; or layers, whose parts are components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.records import Item, LayerBytes, MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text
from bf16prof.reports.units import gib, inert, share
from bf16prof.reports.views import component_name
from bf16prof.vocabulary import Component

_WIDTH, _HEIGHT = 100.0, 36.0
_PIXELS = 380
_LETTER, _LINE = 0.72, 1.75
"""The width of a letter and the height of a line, of a map so wide and high on a page of 1,100
pixels."""

_SMALLEST = 0.0005
"""Tensors below this share of all bytes are drawn as one."""

_GAP = 0.12

NO_LAYER = "of no single layer"


@dataclass(frozen=True)
class _Box:
    """A rectangle of the map."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class _Area:
    """Bytes to draw: areas of one group lie in one rectangle. `text`: what is said where the
    pointer is, line by line."""

    group: str
    name: str
    bytes: int
    colour: str
    text: tuple[str, ...]


def treemap(id_: str, record: MemoryRecord) -> Figure | None:
    """The map of a record's training peak by component and tensor; `None` where its tensors have no
    names."""
    items = _drawn(record.peak_items)
    total = sum(item.bytes for item in items)
    areas = [
        _Area(
            item.component,
            _name(item.name),
            item.bytes,
            palette.COMPONENTS[item.component],
            (component_name(item.component), _name(item.name), f"{gib(item.bytes)}, {share(item.bytes, total)}", inert(item.source)),
        )
        for item in items
    ]
    return _map(id_, areas, "What is alive at the training peak") if areas else None


def layer_map(id_: str, record: MemoryRecord) -> Figure | None:
    """The same map by layer and component; `None` where fewer than two layers are known by name.

    What no layer allocated while it ran - model states, buckets, the loss, autograd's own gradients
    - is one group.
    """
    if len({part.layer for part in record.peak_layers}) < 2:
        return None
    total = sum(record.peak_components.values())
    left = dict(record.peak_components)
    for part in record.peak_layers:
        left[part.component] -= part.bytes
    parts = [*record.peak_layers, *(LayerBytes(NO_LAYER, component, size) for component, size in left.items() if size > 0)]
    areas = [
        _Area(
            part.layer,
            _name(_short(part.layer)) if part.layer != NO_LAYER else component_name(part.component),
            part.bytes,
            palette.COMPONENTS[part.component],
            (_name(part.layer), component_name(part.component), f"{gib(part.bytes)}, {share(part.bytes, total)}"),
        )
        for part in parts
        if part.bytes > total * _SMALLEST
    ]
    return _map(id_, areas, "The training peak by layer")


def _short(layer: str) -> str:
    """The end of a layer's name, which tells it from the others: "layers.3" of "model.layers.3"."""
    return ".".join(layer.split(".")[-2:])


def _map(id_: str, areas: Sequence[_Area], title: str) -> Figure:
    traces: list[Trace] = []
    words: list[dict[str, Any]] = []
    groups = [sorted((a for a in areas if a.group == name), key=_size, reverse=True) for name in dict.fromkeys(a.group for a in areas)]
    groups.sort(key=_sum, reverse=True)
    for group, box in zip(groups, _boxes([_sum(group) for group in groups], _Box(0, 0, _WIDTH, _HEIGHT)), strict=True):
        for area, inner in zip(group, _boxes([area.bytes for area in group], box), strict=True):
            traces.append(_trace(area, inner))
            words += [
                {**text, "name": str(len(traces) - 1)} for text in _words(area, inner)
            ]  # whose the page asks where there is less room
    layout = base_layout(_PIXELS, "", "")
    axis = {"visible": False, "fixedrange": True, "automargin": False, "title": None}
    layout["xaxis"] |= axis | {"range": [0, _WIDTH]}
    layout["yaxis"] |= axis | {"range": [_HEIGHT, 0]}
    layout |= {"annotations": words, "hovermode": "closest", "margin": {"l": 0, "r": 0, "t": 4, "b": 4}}
    said = "; ".join(f"{area.name} {gib(area.bytes)}" for area in sorted(areas, key=_size, reverse=True)[:12])
    return figure(id_, traces, layout, title, said)


def _size(area: _Area) -> int:
    return area.bytes


def _sum(areas: Sequence[_Area]) -> int:
    return sum(area.bytes for area in areas)


def _drawn(items: Sequence[Item]) -> list[Item]:
    """The items to draw: of each component the small ones as one."""
    total = sum(item.bytes for item in items)
    large = [item for item in items if item.bytes > total * _SMALLEST]
    for component in Component:
        rest = [item for item in items if item.component is component and 0 < item.bytes <= total * _SMALLEST]
        if rest and (size := sum(item.bytes for item in rest)) > total * _SMALLEST:
            large.append(Item(component, f"{len(rest)} smaller ones", size))
    return large


def _boxes(sizes: Sequence[int], box: _Box) -> list[_Box]:
    """Rectangles of these areas, biggest first, as near to squares as they come."""
    import squarify

    areas = squarify.normalize_sizes(sizes, box.width, box.height)
    return [_Box(r["x"], r["y"], r["dx"], r["dy"]) for r in squarify.squarify(areas, box.x, box.y, box.width, box.height)]


def _trace(area: _Area, box: _Box) -> Trace:
    left, right, top, bottom = box.x + _GAP, box.x + box.width - _GAP, box.y + _GAP, box.y + box.height - _GAP
    return {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "hoveron": "fills",
        "hoverinfo": "text",
        "text": "<br>".join(plotly_text(line) for line in area.text if line),
        "x": [left, right, right, left, left],
        "y": [top, top, bottom, bottom, top],
        "line": {"width": 0},
        "fillcolor": area.colour,
    }


def _words(area: _Area, box: _Box) -> list[dict[str, Any]]:
    """The name and the size in the rectangle, as far as there is room; nothing where there is
    not."""
    name, size = area.name, gib(area.bytes)
    letters, lines = int((box.width - 1) / _LETTER), int((box.height - 0.4) / _LINE)
    if letters < len(size) or not lines:
        return []
    short = name if len(name) <= letters else name[: letters - 1] + "…"
    one_line = f"{plotly_text(name)} {size}" if len(name) + len(size) < letters else size
    text = f"{plotly_text(short)}<br>{size}" if lines > 1 else one_line
    where = {"x": box.x + 0.5, "y": box.y + 0.3, "xanchor": "left", "yanchor": "top", "align": "left", "showarrow": False}
    return [{"text": text, "font": {"color": palette.on(area.colour), "size": 11}, **where}]


def _name(text: str) -> str:
    return inert(text, 60)
