"""The line of the GPU's memory in a figure of rows: what the caching allocator may hold, case by
case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bf16prof.reports import palette
from bf16prof.reports.plots import GROUND
from bf16prof.reports.rows import Rows
from bf16prof.reports.units import gib
from bf16prof.reports.views import CaseView
from bf16prof.verdict import allocator_limit

_REACH = 4.0
"""A limit beyond so many times the highest bar is named at the edge; drawn, it would leave nothing
to see of the bytes."""

_ROOM = 1.3
"""The axis ends so far behind the highest bar: its text stands there."""


@dataclass(frozen=True)
class LimitLines:
    """The limits of a figure's cases, in the unit of its axis. `most`: the highest of its bars, in
    bytes."""

    rows: Rows
    divisor: int
    most: int

    @property
    def end(self) -> float:
        """Where the axis ends: behind the texts at the bars, and behind the limits within reach."""
        near = [limit * 1.04 for *_, limit in self._limits if self._is_near(limit)]
        return max(self.most * _ROOM, *near, 0) / self.divisor

    def lines(self) -> list[dict[str, Any]]:
        """A line for each case, from its first to its last row, on a lighter one that sets it off
        from the bars."""
        looks = ({"width": 5, "color": GROUND}, {"width": 2, "color": palette.LIMIT})
        return [
            {"type": "line", "x0": limit / self.divisor, "x1": limit / self.divisor, "y0": start - 0.1, "y1": end + 0.1, "line": look}
            for _, start, end, limit in self._limits
            if self._is_near(limit)
            for look in looks
        ]

    def words(self) -> list[dict[str, Any]]:
        """What the lines mean: once where all are the same."""
        found = self._limits
        same = len({limit for *_, limit in found}) == 1
        return [self._word(limit, start - 0.05) for _, start, _, limit in (found[:1] if same else found)]

    @property
    def _limits(self) -> list[tuple[CaseView, float, float, int]]:
        """(case, first and last row, limit) of each case on a GPU."""
        spans = [(view, start, end, limit_of(view)) for view, start, end in self.rows.spans]
        return [(view, start, end, limit) for view, start, end, limit in spans if limit]

    def _word(self, limit: int, y: float) -> dict[str, Any]:
        near = self._is_near(limit)
        where = {"x": limit / self.divisor if near else self.end, "xanchor": "right", "y": y, "yanchor": "bottom"}
        text = f"limit {gib(limit)}" + ("" if near else " →")
        return {"text": text, "showarrow": False, "bgcolor": GROUND, **where}

    def _is_near(self, limit: int) -> bool:
        return limit <= self.most * _REACH


def level(limit: int, divisor: int) -> dict[str, list[dict[str, Any]]]:
    """The shapes and annotations of one limit across a figure whose vertical axis is bytes."""
    y = limit / divisor
    looks = ({"width": 5, "color": GROUND}, {"width": 2, "color": palette.LIMIT})
    text = {"text": f"limit {gib(limit)}", "showarrow": False, "bgcolor": GROUND, "x": 1, "xref": "paper", "xanchor": "right"}
    return {
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": look} for look in looks],
        "annotations": [text | {"y": y, "yanchor": "bottom"}],
    }


def limit_of(view: CaseView) -> int | None:
    """What the allocator may hold in a case, as the record to show says it, else any other; `None`
    where there is no GPU."""
    known = (allocator_limit(record) for record in (view.main, *view.records.values()))
    return next((limit for limit in known if limit), None)
