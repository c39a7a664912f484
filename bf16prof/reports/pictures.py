"""Figures of the page as files: PNG, SVG or PDF, drawn by an installed Chromium or Chrome (the
extra `pictures`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bf16prof.errors import InputError, install_hint
from bf16prof.processes import child_environment
from bf16prof.reports.chosen import headline_case
from bf16prof.reports.figure_names import FIGURES, SUFFIXES
from bf16prof.reports.plots import Figure, finite
from bf16prof.reports.views import CaseView, run_views
from bf16prof.runs import Run

LONGEST_S = 180
"""Seconds after which a browser has failed."""

_WIDTH, _SCALE = 1100, 2
_LEGEND = 28
"""Pixels for a line of the legend, which the page has in words beside the figure."""


class CannotDraw(InputError):
    """A picture that this machine, or these runs, cannot give."""


def figure(runs: Sequence[Run], name: str) -> Figure:
    """A figure by its name. Raises `CannotDraw` where the runs have no data for it, naming those
    that they have."""
    found = _figures(run_views(runs), name)
    if found is None:
        views = run_views(runs)
        known = [other for other in FIGURES if _figures(views, other) is not None]
        raise CannotDraw(f"--figure {name}: nothing to draw: {FIGURES[name]}", hint=f"these runs have: {', '.join(known) or 'no figure'}")
    return found


def picture(runs: Sequence[Run], name: str, suffix: str) -> bytes:
    """The content of a picture file. Raises `CannotDraw` without the packages, the browser or the
    data for it."""
    drawn = on_paper(figure(runs, name))
    require_drawing()
    size = {"width": _WIDTH, "height": drawn["layout"]["height"], "scale": _SCALE if suffix == ".png" else 1}
    return _draw({"figure": drawn, "opts": {"format": suffix.removeprefix("."), **size}})


def _draw(asked: dict[str, Any]) -> bytes:
    """What the browser makes of it. Raises `CannotDraw` if it fails or hangs, and leaves no
    process."""
    command = [sys.executable, "-m", "bf16prof.reports.drawing"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, env=child_environment()) as process:
        try:
            drawn, said = process.communicate(json.dumps(asked).encode(), timeout=LONGEST_S)
        except subprocess.TimeoutExpired as error:
            raise CannotDraw(f"the browser did not draw within {LONGEST_S} seconds", hint="-o page.html has all figures") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode or not drawn:
        last = (said.decode(errors="replace").strip().splitlines() or ["no word of why"])[-1]
        raise CannotDraw(f"the browser did not draw: {last}", hint="-o page.html has all figures")
    return drawn


def require_drawing() -> None:
    """Raise `CannotDraw` unless pictures can be drawn here: kaleido, and a browser for it."""
    from importlib.util import find_spec

    if find_spec("kaleido") is None:
        raise CannotDraw(f"{', '.join(SUFFIXES)} need kaleido", hint=f"{install_hint('pictures')}; -o page.html needs nothing")
    from choreographer.browsers.chromium import Chromium

    if not Chromium.find_browser(skip_local=False):
        raise CannotDraw("pictures need Chromium or Chrome", hint="apt-get install chromium, or BROWSER_PATH=...; -o page.html needs none")


def on_paper(drawn: Figure) -> dict[str, Any]:
    """What Plotly draws of a figure where no page stands around it: with a title and a legend, on
    white."""
    layout = finite(drawn.layout)
    named = [trace for trace in drawn.traces if trace.get("name") and trace.get("mode") != "text"]
    legend = 1 < len({trace["name"] for trace in named}) <= 16
    top = layout["margin"]["t"] + 44 + (_LEGEND * 2 if legend else 0)
    layout |= {
        "width": _WIDTH,
        "height": drawn.height + top - layout["margin"]["t"],
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1, "yref": "container", "yanchor": "top", "xanchor": "left", "x": 0, "traceorder": "normal"},
        "title": {"text": drawn.title, "x": 0.01, "xanchor": "left", "y": 0.99, "yref": "container", "yanchor": "top"},
        "font": {**layout["font"], "color": "#222"},
        "margin": {**layout["margin"], "t": top, "l": 20, "r": 20},
    }
    layout["legend"]["y"] = 1 - 34 / layout["height"]
    return {"data": finite([trace | {"showlegend": trace in named} for trace in drawn.traces]), "layout": layout}


def _figures(views: Sequence[CaseView], name: str) -> Figure | None:
    """The figure of that name; `None` where there is nothing to draw."""
    from bf16prof.reports.figures import all_figures
    from bf16prof.reports.step_panels import CAPTIONS

    if name in CAPTIONS:
        return _of_one_case(views, name)
    return all_figures(views)[name]


def _of_one_case(views: Sequence[CaseView], name: str) -> Figure | None:
    """A figure of the inside of a step: of the case that the page's first screen shows, else of the
    first that has it."""
    from bf16prof.reports.step_panels import panels

    first = headline_case(views)
    ordered = [*(view for view in views if view is first), *(view for view in views if view is not first)]
    for view in ordered:
        for panel in panels([view])[0]:
            if (found := panel.figures.get(name)) is not None:
                return dataclasses.replace(found, title=f"{found.title}: {view.label}")
    return None
