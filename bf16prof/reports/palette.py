"""One fixed colour per component, phase and case, the same in every figure and table.

The hues are those of Okabe and Ito (Color Universal Design, 2008), told apart with any of the common colour deficiencies; the master
copies and the variance are lighter neighbours of what they belong to.
"""

from __future__ import annotations

from bf16prof.records import Component, Phase

COMPONENTS: dict[Component, str] = {
    Component.PARAMETERS: "#0072B2",
    Component.GRADIENTS: "#D55E00",
    Component.MASTER_PARAMETERS: "#56B4E9",
    Component.MASTER_GRADIENTS: "#E69F00",
    Component.MOMENTUM: "#009E73",
    Component.VARIANCE: "#7FCFB4",
    Component.COMPENSATION: "#A6761D",
    Component.ACTIVATIONS: "#CC79A7",
    Component.BUFFERS: "#F0E442",
    Component.WORKSPACE: "#8C6BB1",
    Component.ROUNDING: "#B4B4B4",
    Component.OTHER: "#757575",
}
"""Colour by component, in the order in which bars are stacked."""

PHASES: dict[Phase, tuple[str, str, str]] = {
    Phase.INIT: ("#757575", "diamond", "◆"),
    Phase.FORWARD: ("#0072B2", "circle", "●"),
    Phase.BACKWARD: ("#E69F00", "square", "■"),
    Phase.STEP: ("#CC79A7", "triangle-up", "▲"),
}
"""Colour, Plotly symbol and the same symbol as text, by phase."""

SYMBOLS: dict[str, str] = {"good": "✓", "warn": "!", "bad": "✗"}
"""The symbol of good news, of a warning and of bad news, so that colour is never the only sign."""

CONSOLE: dict[str, str] = {"good": "green", "warn": "yellow", "bad": "red"}
"""Their colours on a console; the page's are in its style sheet, under the same names."""

_SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#757575", "#A6761D", "#66A61E")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def series(index: int) -> str:
    """The colour of the `index`-th recipe; colours repeat after ten."""
    return _SERIES[index % len(_SERIES)]


def dash(index: int) -> str:
    """The line style of the `index`-th combination of stage and world size."""
    return _DASHES[index % len(_DASHES)]
