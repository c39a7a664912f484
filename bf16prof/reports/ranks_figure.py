"""Figures of ranks: what each held at its peak, and how long its forward took, over the number of
the rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bf16prof.records import RankSummary
from bf16prof.reports.limit_lines import level, limit_of
from bf16prof.reports.plots import Figure, Trace, base_layout, figure, plotly_text, step_ticks
from bf16prof.reports.series import case_styles, line
from bf16prof.reports.thinning import thinned
from bf16prof.reports.units import gib, scale, seconds
from bf16prof.reports.views import CaseView
from bf16prof.vocabulary import Phase


@dataclass(frozen=True)
class _Quantity:
    """What is drawn: the id of the figure, the value of a rank, how many of it make one on the
    axis, what the figure is called, the title of the axis, and the value in words.
    """

    id: str
    value: Callable[[RankSummary], float | None]
    divisor: int
    name: str
    title: str
    text: Callable[[float], str]


def rank_peaks(views: Sequence[CaseView]) -> Figure | None:
    """The training peak of every rank; `None` where no case has two ranks that know theirs."""
    divisor, unit = scale(max((rank.peak_allocated_bytes or 0 for view in views for rank in view.main.ranks), default=0))
    what = _Quantity("figure-ranks", lambda rank: rank.peak_allocated_bytes, divisor, "Peak by rank", f"training peak ({unit})", gib)
    drawn, limits = _figure(what, views), {limit for view in views if view.main.ranks and (limit := limit_of(view))}
    if drawn is None or len(limits) != 1:
        return drawn
    return dataclasses.replace(drawn, layout=drawn.layout | level(limits.pop(), divisor))


def rank_times(views: Sequence[CaseView]) -> Figure | None:
    """The median seconds of every rank's forward; `None` where no case has two ranks that know
    theirs."""
    return _figure(
        _Quantity("figure-rank-times", lambda rank: rank.phase_time_s.get(Phase.FORWARD), 1, "Forward by rank", "forward (s)", seconds),
        views,
    )


def _figure(what: _Quantity, views: Sequence[CaseView]) -> Figure | None:
    styles = case_styles(views)
    traces = [trace for index, view in enumerate(views) if (trace := _trace(what, index, view, styles[index]))]
    if not traces:
        return None
    layout = base_layout(300, "rank", what.title)
    layout["xaxis"] |= step_ticks(x for trace in traces for x in trace["x"])
    layout["yaxis"]["rangemode"] = "tozero"
    return figure(what.id, traces, layout, what.name, _words(what, views))


def _trace(what: _Quantity, index: int, view: CaseView, style: tuple[str, str]) -> Trace | None:
    known = [(value, rank) for rank in view.main.ranks if (value := what.value(rank)) is not None]
    if len(known) < 2:
        return None
    points = thinned(known, lambda point: point[0])
    return line(index, style, [rank.rank for _, rank in points], [value / what.divisor for value, _ in points]) | {
        "customdata": [[what.text(value), plotly_text(rank.host), plotly_text(rank.device)] for value, rank in points],
        "hovertemplate": "%{fullData.name}<br>rank %{x} on %{customdata[1]}, %{customdata[2]}: %{customdata[0]}<extra></extra>",
        "name": plotly_text(view.label),
    }


def _words(what: _Quantity, views: Sequence[CaseView]) -> str:
    """The ends of each case's range, for those who do not see the figure."""
    found = []
    for view in views:
        values = [value for rank in view.main.ranks if (value := what.value(rank)) is not None]
        if len(values) > 1:
            found.append(f"{view.label}: {what.text(min(values))} to {what.text(max(values))} over {len(values)} ranks")
    return "; ".join(found)
