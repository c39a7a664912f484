"""What every figure of the reports is made with: Plotly's traces and layouts in plain dicts, which
the page's script draws.

Rules that all figures keep: names are escaped for Plotly's own pseudo-HTML and never stand in a
hover template; colours are fixed (`palette.py`); text and grid take their colour from the page's
style sheet, so that one figure serves light, dark and print.
"""

from __future__ import annotations

import functools
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

CONFIG = {
    "showSendToCloud": False,
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "select2d", "lasso2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "svg"},
}
_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": "#666"}
_GRID = "rgba(128,128,128,0.25)"
GROUND = "rgba(255,255,255,0.7)"
"""Behind text and lines that lie on a figure; the page's style sheet makes it the page's own."""

_MARGIN = {"l": 12, "r": 12, "t": 30, "b": 44}

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure ready for the page: the id of its element, what Plotly draws, what it is called, and
    what it says in words for those who do not see it.

    `legend`: (name, symbol, colour) of what the page has to explain, the colour empty where it is
    any.
    """

    id: str
    traces: tuple[Trace, ...]
    layout: dict[str, Any]
    title: str
    words: str = ""
    legend: tuple[tuple[str, str, str], ...] = ()

    @property
    def name(self) -> str:
        """What it is called on a command line."""
        return self.id.removeprefix("figure-")

    @property
    def series(self) -> tuple[int, ...]:
        """The numbers of the views that it draws as lines."""
        return tuple(trace["meta"] for trace in self.traces if "meta" in trace)

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.layout["height"])

    @property
    def spec(self) -> str:
        """What the page's script draws, as JSON that no name in it can leave."""
        content = {"data": finite(self.traces), "layout": finite(self.layout), "config": CONFIG}
        text = json.dumps(content, separators=(",", ":"))
        return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def fragment(found: Figure) -> str:
    """The HTML that draws a figure at once, in a page that has Plotly's bundle."""
    element = f'<div id="{found.id}" style="height:{found.height}px"></div>'
    return f'{element}<script>{{const s={found.spec};Plotly.newPlot("{found.id}",s.data,s.layout,s.config)}}</script>'


def finite(value: Any) -> Any:
    """The same JSON with NaN and infinity as null: neither is JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def bundle() -> str:
    """Plotly's JavaScript, the bundle for figures with two axes: a third of the whole
    (`vendor/README.md`)."""
    return (resources.files("bf16prof.reports") / "vendor" / "plotly-cartesian.min.js").read_text(encoding="utf-8")


def base_layout(height: int, x_title: str, y_title: str) -> dict[str, Any]:
    """A layout with these titles, transparent and without a legend."""
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "automargin": True}
    return {
        "height": height,
        "autosize": True,
        "margin": dict(_MARGIN),
        "font": _FONT,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "dragmode": "zoom",
        "xaxis": axis | {"title": {"text": x_title}},
        "yaxis": axis | ({"title": {"text": y_title}} if y_title else {}),
    }


def step_ticks(steps: Iterable[float]) -> dict[str, Any]:
    """How an axis of steps is ticked: at whole steps, in short runs at each."""
    known = list(steps)
    each = {"dtick": 1} if known and max(known) - min(known) < _TICKS else {}
    return {"tickformat": "d", **each}


_TICKS = 10


def plotly_text(name: str) -> str:
    """A name for Plotly, which reads `<b>`, `<a href>` and entities in text."""
    return html.escape(name, quote=False)


def figure(id_: str, traces: Sequence[Trace], layout: dict[str, Any], title: str, words: str = "") -> Figure:
    """The figure that draws these traces in an element of that id."""
    return Figure(id_, tuple(traces), layout, title, words)
