"""The figure of the losses: every curve, and where there are steps or seeds enough, the running
mean over the seeds of a case."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bf16prof.reports.losses import LossGap, SeedGroup, loss_gaps, of_finite, running_mean, seed_groups, window_of
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text, step_ticks
from bf16prof.reports.series import case_styles, line
from bf16prof.reports.thinning import thinned
from bf16prof.reports.units import number
from bf16prof.reports.views import CaseView, loss_text, losses

_FAINT = 0.25


def loss_curves(views: Sequence[CaseView]) -> Figure | None:
    """The loss over steps, one line per case: the colour says the recipe, the line style the stage
    and the number of ranks.

    The curves of a case with several seeds have one look and lie over each other, faint, with their
    running mean on top.
    """
    styles = case_styles(views)
    groups = seed_groups(views)
    means = {group.indices[0]: curve for group in groups if (curve := mean_curve(group))}
    covered = {index for group in groups if group.indices[0] in means for index in group.indices}
    curves = [_curve(i, view, styles[i], faint=i in covered) for i, view in enumerate(views) if _drawn(view)]
    if not curves:
        return None
    on_top = [_mean(first, means[first], styles[first], group) for group in groups if (first := group.indices[0]) in means]
    layout = base_layout(380, "step", "loss")
    layout["xaxis"] |= step_ticks(step for curve in curves for step in curve["x"])
    words = "; ".join(f"{view.label}: {loss_text(view.main)}" for view in views if _drawn(view))
    return figure("figure-losses", curves + on_top, layout, "Loss by step", words)


def loss_differences(views: Sequence[CaseView]) -> Figure | None:
    """The running means less that of the reference that each case is compared with: curves that
    coincide are told apart by it.

    `None` where nothing is to be compared, or the recipes have no step in common.
    """
    styles, groups = case_styles(views), seed_groups(views)
    compared = loss_gaps(groups)
    traces = [trace for found in compared if (trace := _difference(found, styles[found.group.indices[0]]))]
    if not traces:
        return None
    names = ", ".join(plotly_text(name) for name in dict.fromkeys(found.reference.recipe for found in compared))
    layout = base_layout(300, "step", f"loss less that of {names}")
    layout["xaxis"] |= step_ticks(step for trace in traces for step in trace["x"])
    layout["yaxis"] |= {"zeroline": True, "zerolinewidth": 2}
    words = "; ".join(f"{trace['name']}: {trace['customdata'][-1]} at the end" for trace in traces)
    return figure("figure-differences", traces, layout, "Loss, less that of the reference", words)


def _difference(found: LossGap, style: tuple[str, str]) -> Trace | None:
    """One curve: the difference at the steps that both have; `None` where there are none, or none
    whose losses are finite."""
    own, other = _whole_curve(found.group), dict(_whole_curve(found.reference))
    pairs = [(step, loss, other.get(step)) for step, loss in own]
    curve = thinned([(step, loss - zero) for step, loss, zero in pairs if loss is not None and zero is not None], lambda point: point[1])
    if not curve:
        return None
    trace = line(found.group.indices[0], style, [step for step, _ in curve], [value for _, value in curve]) | {"mode": "lines"}
    return trace | {
        "customdata": [f"{value:+.4f}" for _, value in curve],
        "hovertemplate": "%{fullData.name}<br>step %{x}: %{customdata}<extra></extra>",
        "name": plotly_text(f"{found.group.label}, less {found.reference.label}"),
    }


def _whole_curve(group: SeedGroup) -> list[tuple[int, float | None]]:
    """The running mean over the seeds of a group; of a short run alone its curve."""
    return mean_curve(group) or losses(group.views[0].main)


def _drawn(view: CaseView) -> bool:
    return any(loss is not None for _, loss in losses(view.main))


def mean_curve(group: SeedGroup) -> list[tuple[int, float | None]]:
    """(step, running mean) of the mean over the group's seeds, at the steps that all have; empty
    where it would be the curve itself."""
    curves = [dict(found) for view in group.views if (found := losses(view.main))]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    window = window_of(len(steps))
    if len(curves) < 2 and window < 2:
        return []
    return running_mean([(step, of_finite(statistics.fmean, [curve[step] for curve in curves])) for step in steps], window)


def _curve(index: int, view: CaseView, style: tuple[str, str], *, faint: bool) -> Trace:
    curve = thinned(losses(view.main), _loss)
    trace = line(index, style, [step for step, _ in curve], [loss for _, loss in curve])
    look = {"mode": "lines", "opacity": _FAINT, "line": {**trace["line"], "width": 1}} if faint else {}
    return _named(trace | look, view.label, [loss for _, loss in curve])


def _loss(point: tuple[int, float | None]) -> float | None:
    return point[1]


def _mean(index: int, all_of_it: Sequence[tuple[int, float | None]], style: tuple[str, str], group: SeedGroup) -> Trace:
    curve = thinned(all_of_it, _loss)
    trace = line(index, style, [step for step, _ in curve], [loss for _, loss in curve]) | {"mode": "lines"}
    seeds = f" over {len(group.views)} seeds" if len(group.views) > 1 else ""
    return _named(trace, f"{group.label}, running mean{seeds}", [loss for _, loss in curve])


def _named(trace: Trace, name: str, values: Sequence[float | None]) -> Trace:
    return trace | {
        "customdata": [number(loss) for loss in values],
        "hovertemplate": "%{fullData.name}<br>step %{x}: %{customdata}<extra></extra>",
        "name": plotly_text(name),
    }
