"""A figure of rows: each case has a heading, and under it one row per record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bf16prof.records import MemoryRecord
from bf16prof.reports.plots import base_layout, plotly_text
from bf16prof.reports.views import CaseView

_HEADING, _HEADER = 0.85, 1.15
"""The height of a heading, and of a case beyond its records, where a record is 1."""

_PIXELS = 26


class Row(NamedTuple):
    """A record of a case, and where it is drawn."""

    view: CaseView
    y: float
    record: MemoryRecord


class Rows:
    """A vertical axis on which each case has a heading and, under it, one row per record."""

    def __init__(self, views: Sequence[CaseView], choose: Callable[[CaseView], list[MemoryRecord]], pixels: int = _PIXELS) -> None:
        self.records: list[Row] = []
        self.spans: list[tuple[CaseView, float, float]] = []
        """(case, where its first row begins, where its last one ends)."""
        self._headings: list[tuple[float, str]] = []
        self._pixels = pixels
        y = 0.0
        for view in views:
            chosen = choose(view)
            if not chosen:
                continue
            self._headings.append((y, view.label))
            y += _HEADING
            self.spans.append((view, y - 0.5, y + len(chosen) - 0.5))
            for record in chosen:
                self.records.append(Row(view, y, record))
                y += 1
            y += _HEADER - _HEADING
        self._end = y

    def layout(self, title: str) -> dict[str, Any]:
        """The layout of such a figure, whose horizontal axis has this title."""
        layout = base_layout(int(self._end * self._pixels + 88), title, "")
        layout["yaxis"] |= {
            "range": [self._end - 0.4, -0.6],
            "tickvals": [row.y for row in self.records],
            "ticktext": [str(row.record.source) for row in self.records],
            "showgrid": False,
            "fixedrange": True,
            "zeroline": False,
            "ticklabelstandoff": 6,
        }
        layout["annotations"] = [
            {"x": 0, "xref": "paper", "xanchor": "left", "y": y, "text": f"<b>{plotly_text(label)}</b>", "showarrow": False}
            for y, label in self._headings
        ]
        layout["hovermode"] = "closest"
        return layout
