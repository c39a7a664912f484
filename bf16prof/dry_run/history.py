"""What a ledger tells when the run is over: what was alive at the peak, and the timeline of a
step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from bf16prof.dry_run.ledger import Allocation, Ledger, Mark, by_component
from bf16prof.records import Item, LayerBytes, PhaseStart, Timeline
from bf16prof.vocabulary import ROUNDED, Component, Label, Phase

BEFORE = "held before the step"
"""What the first point of a timeline is."""

POINTS = 2000
"""A timeline has at most so many points."""


def training_peak(ledger: Ledger) -> int:
    """The number of the event (counted from 1) that reaches the highest allocation from the first
    forward pass on, be it one of an evaluation, init left out.

    A script may build another engine when it has begun to train.
    """
    first = next(mark.event for mark in ledger.marks if mark.phase in (Phase.FORWARD, Phase.EVAL))
    begins = {mark.event: mark.phase for mark in ledger.marks}
    best = held = highest = 0
    phase = None
    for number, (allocation, sign) in enumerate(_events(ledger), 1):
        phase = begins.get(number - 1, phase)
        held += sign * allocation.held
        if number > first and held > highest and phase is not Phase.INIT:
            best, highest = number, held
    return best


def items_at(ledger: Ledger, event: int) -> tuple[Item, ...]:
    """What is alive after the first `event` events, by component and name, biggest first."""
    sizes: dict[Label, int] = {}
    for allocation in ledger.live(event):
        sizes[allocation.label] = sizes.get(allocation.label, 0) + allocation.bytes
        sizes[ROUNDED] = sizes.get(ROUNDED, 0) + allocation.held - allocation.bytes
    ordered = sorted(sizes.items(), key=lambda pair: -pair[1])
    return tuple(Item(component, name, size, "simulated") for (component, name), size in ordered if size)


def layers_at(ledger: Ledger, event: int) -> tuple[LayerBytes, ...]:
    """What is alive after the first `event` events and was allocated by a layer, in the order in
    which the layers first allocated it."""
    sizes: dict[tuple[str, Component], int] = {}
    for allocation in ledger.live(event):
        if allocation.layer:
            key = layer_of(allocation.layer), allocation.label[0]
            sizes[key] = sizes.get(key, 0) + allocation.bytes
    return tuple(LayerBytes(*key, size) for key, size in sizes.items() if size)


def layer_of(module: str) -> str:
    """The layer that a module is part of: its name up to the first number, as in
    `model.layers.3.mlp.up_proj`; else the whole name."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def timeline(ledger: Ledger, step: int) -> Timeline:
    """Bytes by component over a step, thinned to `POINTS` points; of the events between two points
    the highest is kept."""
    start, end = [*ledger.step_starts, len(ledger.events)][step : step + 2]
    now = dict.fromkeys(Component, 0) | by_component(ledger.live(start))
    events = list(itertools.islice(_events(ledger), start, end))
    states = [(0, dict(now)), *_states(events, now)]
    happened = [(sign * allocation.bytes, what_it_is(allocation)) for allocation, sign in events]
    names = {name: number for number, name in enumerate(dict.fromkeys([BEFORE, *(name for _, name in happened)]))}
    whole = Timeline(
        events=tuple(event for event, _ in states),
        names=tuple(names),
        changes=tuple((size, names[name]) for size, name in [(0, BEFORE), *happened]),
        phases=tuple(_phases([mark for mark in ledger.marks if mark.step == step], start)),
        components={component: tuple(state[component] for _, state in states) for component in Component},
    )
    thin = whole.thinned(POINTS)
    return replace(thin, components={component: sizes for component, sizes in thin.components.items() if any(sizes)})


def _phases(marks: Sequence[Mark], start: int) -> Iterator[PhaseStart]:
    """Where each phase begins; the batches of an evaluation are one."""
    before = None
    for mark in marks:
        if mark.phase is not None and mark.phase is not before:
            yield PhaseStart(mark.phase, mark.event - start)
        before = mark.phase


def what_it_is(allocation: Allocation) -> str:
    """A storage in words: its component, the name under which it is listed, and the module that
    allocated it."""
    component, name = allocation.label
    return f"{component}: {name}" + (f", {allocation.layer}" if allocation.layer else "")


State = tuple[int, dict[Component, int]]


def _states(events: Iterable[tuple[Allocation, int]], now: dict[Component, int]) -> Iterator[State]:
    for number, (allocation, sign) in enumerate(events, 1):
        now[allocation.label[0]] += sign * allocation.bytes
        now[Component.ROUNDING] += sign * (allocation.held - allocation.bytes)
        yield number, dict(now)


def _events(ledger: Ledger) -> Iterator[tuple[Allocation, int]]:
    """Each event's storage, and 1 where it begins, -1 where it ends."""
    for event in ledger.events:
        yield ledger.allocations[abs(event) - 1], 1 if event > 0 else -1
