"""One palette per meaning: a colour says a component, a phase or a recipe, and never two of them.

The hues of components are those of Okabe and Ito (Color Universal Design, 2008), told apart with
any of the common colour deficiencies; the master copies and the variance are lighter neighbours of
what they belong to. Those of recipes and phases lie as far from these, and from each other, as
mid-tones that stand out on white and on black allow (a test holds the distance). Sources have no
colour: what was measured is solid, what was predicted hatched or open.
"""

from __future__ import annotations

from bf16prof.vocabulary import Component, Phase

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

LETTERS: dict[Component, str] = {
    Component.PARAMETERS: "P",
    Component.GRADIENTS: "G",
    Component.MASTER_PARAMETERS: "M",
    Component.MASTER_GRADIENTS: "D",
    Component.MOMENTUM: "1",
    Component.VARIANCE: "2",
    Component.COMPENSATION: "C",
    Component.ACTIVATIONS: "A",
    Component.BUFFERS: "B",
    Component.WORKSPACE: "W",
    Component.ROUNDING: "R",
    Component.OTHER: "O",
}
"""What a bar of characters is made of, so that it reads without colours too: the moments are Adam's
first and second."""

PHASES: dict[Phase, tuple[str, str, str]] = {
    Phase.INIT: ("#8C5B6F", "diamond", "◆"),
    Phase.FORWARD: ("#34735A", "circle", "●"),
    Phase.BACKWARD: ("#8C8C00", "square", "■"),
    Phase.STEP: ("#D900AD", "triangle-up", "▲"),
    Phase.EVAL: ("#5454FC", "triangle-down", "▼"),
}
"""Colour, Plotly symbol and the same symbol as text, by phase."""

LIMIT = "#C1121F"
"""The line of a GPU's memory."""

UNTOLD = "#C9CED4"
"""Bytes of which only the sum is known."""

INK = "#757575"
"""Lines and marks that mean no component, phase or recipe; grey, and readable on white and on
black."""

SYMBOLS: dict[str, str] = {"good": "✓", "warn": "!", "bad": "✗"}
"""The symbol of good news, of a warning and of bad news, so that colour is never the only sign."""

CONSOLE: dict[str, str] = {"good": "green", "warn": "yellow", "bad": "red"}
"""Their colours on a console; the page's are in its style sheet, under the same names."""

RECIPES = ("#3667D9", "#A6544B", "#007E8C", "#59731D", "#AD00D9", "#D9006C", "#00A600", "#8C825B", "#BF56BF", "#008C38")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def series(index: int) -> str:
    """The colour of the `index`-th recipe; colours repeat after ten."""
    return RECIPES[index % len(RECIPES)]


def dash(index: int) -> str:
    """The line style of the `index`-th combination of stage and world size."""
    return _DASHES[index % len(_DASHES)]


def on(colour: str) -> str:
    """Black or white, whichever reads better on a colour (WCAG's relative luminance)."""
    red, green, blue = (_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > _MIDDLE else "#ffffff"


_MIDDLE = 0.179
"""Above this luminance black has more contrast than white."""


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
