"""Steps that need not be run: what the last step allocated and freed, done again by the ledger alone.

Every step after the second asks for the same storages in the same order. What differs from step to step is only where the caching allocator
finds room for them, which moves unsplit remainders and reserved segments about until it has settled. So the steps after the second are
repeated on the allocator's side, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bf16prof.simulate.ledger import Allocation, Ledger, Mark


@dataclass(frozen=True)
class Step:
    """One optimizer step: its events, stream uses and marks, and which of its storages takes the place of which earlier one."""

    start: int
    end: int
    marks: tuple[Mark, ...]
    successors: dict[int, int]


def last_step(ledger: Ledger) -> Step | None:
    """The step that has just ended; `None` if what it leaves behind is not what it found, so that the next one would differ."""
    marks = tuple(mark for mark in ledger.marks if mark.step == ledger.step)
    start, end = ledger.step_starts[-1], len(ledger.events)
    first_new = min((event - 1 for event in ledger.events[start:end] if event > 0), default=len(ledger.allocations))
    ended = {-event - 1 for event in ledger.events[start:end] if event < 0}
    found = sorted(index for index in ended if index < first_new)
    left = [index for index in range(first_new, len(ledger.allocations)) if index not in ended]
    if [_kind(ledger.allocations[i]) for i in found] != [_kind(ledger.allocations[i]) for i in left]:
        return None
    return Step(start, end, marks, dict(zip(found, left, strict=True)))


def _kind(allocation: Allocation) -> tuple[int, int, int]:
    return allocation.bytes, allocation.count, allocation.stream


def repeat(ledger: Ledger, step: Step) -> Iterator[Mark]:
    """Do the step again; yields each mark before the events that follow it. Storages that it found are those that the last one left."""
    now = {old: ledger.allocations[new] for old, new in step.successors.items()}
    uses: dict[int, list[tuple[int, int]]] = {}
    for before, index, stream in ledger.stream_uses:
        if step.start <= before <= step.end:
            uses.setdefault(before, []).append((index, stream))
    marks = iter(step.marks)
    mark = next(marks, None)
    for position, event in enumerate(ledger.events[step.start : step.end], step.start):
        while mark is not None and mark.event <= position:
            yield mark
            mark = next(marks, None)
        for index, stream in uses.get(position, ()):
            ledger.use_on_stream(now.get(index, ledger.allocations[index]), stream)
        if event > 0:
            original = ledger.allocations[event - 1]
            ledger.stream = original.stream
            now[event - 1] = ledger.begin(original.bytes // original.count, original.label, original.count)
        else:
            ledger.end(now.get(-event - 1, ledger.allocations[-event - 1]))
    ledger.stream = 0
    if mark is not None:
        yield mark
        yield from marks
