"""What every figure of the HTML report is made with: Plotly figures in plain dicts, turned into HTML fragments.

Rules that all figures keep: names are escaped for Plotly's own pseudo-HTML and never stand in a hover template; colours are fixed
(`palette.py`); text and grid take their colour from the page's style sheet, so that one fragment serves light, dark and print.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_CONFIG = {
    "showSendToCloud": False,
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "select2d", "lasso2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "svg"},
}
_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": "#666"}
_GRID = "rgba(128,128,128,0.25)"
_MARGIN = {"l": 12, "r": 12, "t": 30, "b": 44}

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure ready for the page: the id of its element, its HTML fragment (a div and the script that draws in it), and the numbers of
    the views that it draws as lines. `legend`: (name, symbol, colour) of what the page has to explain, the colour empty where it is any."""

    id: str
    html: str
    series: tuple[int, ...] = ()
    legend: tuple[tuple[str, str, str], ...] = ()


def bundle() -> str:
    """Plotly's own JavaScript, as shipped with the Python package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


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


def figure(id_: str, traces: list[Trace], layout: dict[str, Any]) -> Figure:
    """The fragment that draws these traces in an element of that id."""
    import plotly.io

    fragment = plotly.io.to_html(
        {"data": traces, "layout": layout},
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=id_,
        config=_CONFIG,
        default_height=f"{layout['height']}px",
    )
    return Figure(id_, str(fragment), tuple(trace["meta"] for trace in traces if "meta" in trace))
