"""How the lines of a figure look: one per case, with a colour and a dash that are the same in every
figure."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.reports import palette
from bf16prof.reports.losses import seed_groups
from bf16prof.reports.plots import Trace
from bf16prof.reports.views import CaseView


def case_styles(views: Sequence[CaseView]) -> list[tuple[str, str]]:
    """(colour, dash) of each case: the colour by recipe, the dash by everything else but the
    seed."""
    recipes = list(dict.fromkeys(view.case.recipe for view in views))
    run = {index: group.views[0].run for group in seed_groups(views) for index in group.indices}
    rest = [(v.case.profile, v.case.zero_stage, v.case.world_size, v.case.offload, v.device, run[i]) for i, v in enumerate(views)]
    kinds = list(dict.fromkeys(rest))
    return [(palette.series(recipes.index(v.case.recipe)), palette.dash(kinds.index(r))) for v, r in zip(views, rest, strict=True)]


def line(index: int, style: tuple[str, str], x: Sequence[float], y: Sequence[float | None]) -> Trace:
    """A line whose `meta` is the number of its view, by which the page's legend shows and hides
    it."""
    colour, dash = style
    marker = {"size": 4, "color": colour}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "meta": index,
        "x": x,
        "y": y,
        "line": {"color": colour, "dash": dash},
        "marker": marker,
    }
