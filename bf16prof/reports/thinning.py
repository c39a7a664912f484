"""Long runs on a page: curves with as many points as can be told apart, and records with as many
steps.

A curve keeps the lowest and the highest point of each stretch, so that no spike goes missing, and
the points that are no number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from bf16prof.records import MemoryRecord
from bf16prof.rounding import ceil_div

MOST_POINTS = 2000
"""Points of a curve. A figure is some thousand pixels wide."""

T = TypeVar("T")


def thinned(points: Sequence[T], value: Callable[[T], float | None], most: int = MOST_POINTS) -> list[T]:
    """About `most` of the points at most, in their order, the first and the last among them; all
    where there are no more."""
    if len(points) <= most:
        return list(points)
    width = ceil_div(len(points), max(1, most // 3))
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), width):
        numbers = range(start, min(start + width, len(points)))
        known = {n: found for n in numbers if (found := value(points[n])) is not None}
        if known:
            kept |= {min(known, key=known.__getitem__), max(known, key=known.__getitem__)}
        kept |= set([n for n in numbers if n not in known][:1])
    return [points[n] for n in sorted(kept)]


def as_kept(record: MemoryRecord) -> MemoryRecord:
    """The record as a page keeps it beside its figures, which say what each event of the timeline
    was."""
    record = _with_few_steps(record)
    return replace(record, timeline=replace(record.timeline, names=(), changes=())) if record.timeline else record


def _with_few_steps(record: MemoryRecord) -> MemoryRecord:
    """The record as a page keeps it: of a long run every so manyth step, and a note that says
    so."""
    if len(record.steps) <= MOST_POINTS:
        return record
    steps = record.steps[:: ceil_div(len(record.steps), MOST_POINTS)]
    note = f"of {len(record.steps):,} steps {len(steps):,} are kept in this page; records.json has all"
    return replace(record, steps=steps, notes=(*record.notes, note))


def thinning_note(records: Sequence[MemoryRecord]) -> str:
    """What a reader of the figures has to know; empty where all steps are drawn."""
    longest = max((len(record.steps) for record in records), default=0)
    if longest <= MOST_POINTS:
        return ""
    return f"Of runs with more than {MOST_POINTS:,} steps (up to {longest:,} here) the lowest and the highest of every few steps are drawn."
