"""Work that need not be run: what a step or a micro-step allocated and freed, done again by the
ledger alone, in milliseconds.

* Steps. Every step after the second asks for the same storages in the same order. What differs from
  step to step is only where the caching allocator finds room for them, which moves unsplit
  remainders and reserved segments about until it has settled (`last_step`, `repeat`).
* Micro-steps of gradient accumulation, once one has done exactly what the one before it did
  (`micro_steps.py` finds out). They are done again until the allocator is as it was after an
  earlier one; from there on they go round, and whole rounds are left out (`repeat_body`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass

from bf16prof.dry_run.ledger import Allocation, Instant, Ledger, Loop, Mark


@dataclass(frozen=True)
class RepeatedStep:
    """One optimizer step: its events and marks, and which of its storages takes the place of which
    earlier one."""

    start: Instant
    end: Instant
    successors: dict[int, int]


@dataclass(frozen=True)
class Body:
    """A micro-step in a ledger. `before` is the start of the one before it, whose storages it
    frees.

    `base` and `before_base` are the indices of the first storages of both. Storage `base + n` takes
    the place of `before_base + n`.
    """

    before: Instant
    start: Instant
    end: Instant
    before_base: int
    base: int

    @classmethod
    def of(cls, ledger: Ledger, before: Instant, start: Instant, end: Instant) -> Body:
        """The micro-step between two moments."""
        return cls(before, start, end, _first_new(ledger, before, start), _first_new(ledger, start, end))

    def name(self, index: int) -> tuple[str, int]:
        """A storage by its number in this micro-step or in the one before it; one from earlier by
        its own."""
        if index >= self.base:
            return "its", index - self.base
        return ("earlier", index) if index < self.before_base else ("left", index - self.before_base)


def last_step(ledger: Ledger) -> RepeatedStep | None:
    """The step that has just ended; `None` if what it leaves behind is not what it found, so that
    the next one would differ."""
    marks = sum(mark.step < ledger.step for mark in ledger.marks)
    start, end = Instant(ledger.step_starts[-1], marks), ledger.now()
    first_new = _first_new(ledger, start, end)
    ended = {-event - 1 for event in ledger.events[start.events : end.events] if event < 0}
    found = sorted(index for index in ended if index < first_new)
    left = [index for index in range(first_new, len(ledger.allocations)) if index not in ended]
    if [kind(ledger.allocations[i]) for i in found] != [kind(ledger.allocations[i]) for i in left]:
        return None
    return RepeatedStep(start, end, dict(zip(found, left, strict=True)))


def kind(allocation: Allocation) -> tuple[int, int, int]:
    """What is asked of the allocator for a storage."""
    return allocation.bytes, allocation.count, allocation.stream


def repeat(ledger: Ledger, step: RepeatedStep, *, succeeding: bool = False) -> Iterator[Mark]:
    """Do the step again; yields each mark before the events that follow it. Storages that it found
    are those that the last one left.

    `succeeding`: whoever holds what that one has left holds what this one leaves.
    """
    now = {old: ledger.allocations[new] for old, new in step.successors.items()}
    loops = {loop.end: loop for loop in ledger.loops if step.start <= loop.start < step.end}
    borders = sorted({border for loop in loops.values() for border in (loop.before, loop.start, loop.end)})
    places: dict[Instant, Instant] = {}

    def begun(index: int, allocation: Allocation) -> None:
        now[index] = allocation

    at = step.start
    for border in [*borders, step.end]:
        yield from _play(ledger, at, border, lambda index: now.get(index, ledger.allocations[index]), begun)
        at, places[border] = border, ledger.now()
        if (loop := loops.get(border)) is not None:
            yield from repeat_body(ledger, Body.of(ledger, places[loop.before], places[loop.start], places[border]), loop.left_out)
    for left in step.successors.values() if succeeding else ():
        ledger.succeed(ledger.allocations[left], now[left])


def repeat_body(ledger: Ledger, body: Body, times: int) -> Iterator[Mark]:
    """Do the micro-step again so many times, but for whole rounds at the end of which everything is
    as it was; yields the marks.

    Real tensors hold storages of the first; those of the last take their place.
    """
    count = sum(event > 0 for event in ledger.events[body.start.events : body.end.events])
    left = [index for index in range(count) if ledger.allocations[body.base + index].is_live]
    last = body
    known = {_placement(ledger, body, left): 0}
    done = left_out = 0
    while done + left_out < times:
        last = yield from _again(ledger, last)
        done += 1
        round_length = done - known.setdefault(_placement(ledger, last, left), done)
        if round_length and not left_out:
            left_out = (times - done) // round_length * round_length
            if left_out:
                ledger.loops.append(Loop(last.before, last.start, last.end, left_out))
    for index in left:
        ledger.succeed(ledger.allocations[body.base + index], ledger.allocations[last.base + index])


def _again(ledger: Ledger, body: Body) -> Generator[Mark, None, Body]:
    """Do the micro-step once more; what it freed of the one before it, it frees of itself now."""
    start, base = ledger.now(), len(ledger.allocations)

    def now(index: int) -> Allocation:
        if index >= body.base:
            return ledger.allocations[base + index - body.base]
        return ledger.allocations[index if index < body.before_base else body.base + index - body.before_base]

    yield from _play(ledger, body.start, body.end, now, lambda *_: None)
    return Body(body.start, start, ledger.now(), body.base, base)


def _play(
    ledger: Ledger, start: Instant, end: Instant, now: Callable[[int], Allocation], begun: Callable[[int, Allocation], None]
) -> Iterator[Mark]:
    """Do what happened between two moments again; yields each mark before the events that follow
    it.

    `now`: what stands for a storage of then; `begun` is told of new ones.
    """
    uses = stream_uses(ledger, start, end)
    marks: Sequence[Mark] = ledger.marks[start.marks : end.marks]
    yielded = 0
    for position, event in enumerate(ledger.events[start.events : end.events], start.events):
        while yielded < len(marks) and marks[yielded].event <= position:
            yield marks[yielded]
            yielded += 1
        for index, stream in uses.get(position, ()):
            ledger.use_on_stream(now(index), stream)
        if event > 0:
            original = ledger.allocations[event - 1]
            ledger.stream, ledger.layer = original.stream, original.layer
            begun(event - 1, ledger.begin(original.bytes // original.count, original.label, original.count))
        else:
            ledger.end(now(-event - 1))
    ledger.stream, ledger.layer = 0, ""
    yield from marks[yielded:]


def stream_uses(ledger: Ledger, start: Instant, end: Instant) -> dict[int, list[tuple[int, int]]]:
    """Storages that other streams used between two moments, and the streams, by the number of
    events before that."""
    uses: dict[int, list[tuple[int, int]]] = {}
    for before, index, stream in ledger.stream_uses:
        if start.events <= before < end.events:
            uses.setdefault(before, []).append((index, stream))
    return uses


def _placement(ledger: Ledger, body: Body, left: Sequence[int]) -> Hashable:
    """Everything that decides where the allocator finds room next: its blocks, and where the
    storages lie that the micro-step has left."""
    if ledger.allocator is None:
        return None
    places = tuple(block.address for index in left for block in ledger.allocations[body.base + index].blocks)
    return tuple(ledger.allocator.segments()), places


def _first_new(ledger: Ledger, start: Instant, end: Instant) -> int:
    """The index of the first storage that begins between two moments, or that will begin after
    them."""
    return next((event - 1 for event in ledger.events[start.events : end.events] if event > 0), len(ledger.allocations))
