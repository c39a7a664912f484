"""The events of a whole forward and backward pass, from the tape of a few layers: layers between the first and the last repeat.

Events between two events that concern the engine (a gradient is there, a module is entered) are put together to a `Segment`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bf16prof.models.autograd.operators import cross_entropy
from bf16prof.models.autograd.tape import Event, Precision, Tape
from bf16prof.models.tapes import Run, forward
from bf16prof.records import Label

REPEATING = 3
"""Layers on a tape: the first, one that repeats, and the last."""


class Segment(NamedTuple):
    """What happens to activations up to the next event for the engine: the highest, after how many events, the change, and that event."""

    highest: int
    at: int
    net: int
    kind: str
    subject: Any
    bytes: int
    end: int


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the tape: a layer's forward or backward pass, or what lies before, between and after the layers."""

    events: Sequence[Event]
    segments: Sequence[Segment]

    def sizes(self, end: int | None = None) -> dict[Label, int]:
        """By label, how much the first `end` events have changed (all, if not given)."""
        sizes: dict[Label, int] = {}
        for kind, subject, size in self.events[:end]:
            if kind == "memory":
                sizes[subject] = sizes.get(subject, 0) + size
        return sizes

    @functools.cached_property
    def net(self) -> dict[Label, int]:
        """By label, the change over the whole section."""
        return self.sizes()

    @functools.cached_property
    def _shifted(self) -> dict[int, Sequence[Segment]]:
        return {0: self.segments}

    def shifted(self, layers: int) -> Sequence[Segment]:
        """The segments so many layers further on."""
        if layers not in self._shifted:
            self._shifted[layers] = [
                each if each.subject is None else each._replace(subject=_shift(each.subject, layers)) for each in self.segments
            ]
        return self._shifted[layers]


@dataclass(frozen=True, eq=False)
class Program:
    """Sections in the order in which they run, each with how many layers further on it runs than on the tape."""

    sections: Sequence[tuple[Section, int]]

    @functools.cached_property
    def net(self) -> dict[Label, int]:
        """By label, what a micro-step leaves: the logits, and gradients where the engine has not taken them."""
        sizes: dict[Label, int] = {}
        for section, _ in self.sections:
            for label, size in section.net.items():
                sizes[label] = sizes.get(label, 0) + size
        return {label: size for label, size in sizes.items() if size}

    @functools.cached_property
    def operations(self) -> Mapping[str, int]:
        """Operations of the matrix products of a micro-step in each part of it: `forward`, `backward`, or `recomputed`."""
        found: dict[str, int] = {}
        for section, _ in self.sections:
            for kind, part, count in section.events:
                if kind == "compute":
                    found[part] = found.get(part, 0) + count
        return found

    def modules(self) -> Iterator[tuple[int, str]]:
        """The modules in the order in which they are entered, forwards and backwards: ZeRO-3's trace."""
        for section, shift in self.sections:
            for segment in section.segments:
                if segment.kind in {"fetch", "fetch backward"}:
                    layer, name = segment.subject
                    yield (layer + shift if layer >= 0 else layer), name


def _later(segment: Segment, layers: int) -> Segment:
    highest, at, net, kind, subject, size, end = segment
    return Segment(highest, at, net, kind, _shift(subject, layers), size, end)


def _shift(subject: Any, layers: int) -> Any:
    first, second = subject
    if isinstance(first, tuple):
        return (_shift(first, layers), (second, layers))
    return (first + layers, second) if first >= 0 else subject


@functools.cache
def program(run: Run, precision: Precision, zero3: bool, memory_efficient_linear: bool, block: int) -> Program:
    """The program of a micro-batch. `block`: the allocator's block size (1: it does not round)."""
    layers = run.model.num_layers
    taped = min(layers, REPEATING)
    parts = _parts(_record(run, Tape(precision, zero3=zero3, memory_efficient_linear=memory_efficient_linear), taped))
    sections = [Section(part, list(_segments(part, block))) for part in parts]
    first, second = 1, 2 + taped  # of the layers' forward passes, and of what is forgotten of each layer
    forwards = _repeated(sections[first : first + taped], layers)
    forgotten = _repeated(sections[second : second + taped], layers)
    backwards = _repeated(sections[second + 2 * taped : second + taped : -1], layers)
    between = [(sections[first + taped], layers - taped)]
    turn = [(sections[second + taped], layers - taped)]
    return Program([(sections[0], 0), *forwards, *between, *forgotten, *turn, *reversed(backwards), (sections[-1], 0)])


def _repeated(sections: Sequence[Section], layers: int) -> list[tuple[Section, int]]:
    """The sections of the taped layers for so many layers: the second one repeats."""
    more = layers - len(sections)
    if not more:
        return [(section, 0) for section in sections]
    return [(sections[0], 0), *((sections[1], shift) for shift in range(more + 1)), (sections[2], more)]


def _record(run: Run, tape: Tape, layers: int) -> list[Event]:
    logits = forward(tape, run, layers)
    tape.mark("logits")
    loss = cross_entropy(tape, logits)
    tape.mark("loss")
    _leave_autocast(tape, layers)
    tape.mark("backward")
    tape.phase = "backward"
    tape.backward(loss, tape.new(1, loss.width, "ones_like"))
    return list(tape.events)


def _leave_autocast(tape: Tape, layers: int) -> None:
    """Forget the casts of weights, layer by layer."""
    for layer in range(-1, layers):
        for key in [key for key in tape.casts if key[0] == layer]:
            del tape.casts[key]
        tape.mark("cut")


def _parts(events: Sequence[Event]) -> list[list[Event]]:
    parts: list[list[Event]] = [[]]
    for event in events:
        if event.kind in {"cut", "cut backward"}:
            parts.append([])
        else:
            parts[-1].append(event)
    return parts


def _segments(events: Sequence[Event], block: int) -> Iterator[Segment]:
    level = highest = at = 0
    for index, (kind, subject, size) in enumerate(events, 1):
        if kind == "memory":
            level += -(-size // block) * block if size > 0 else size // block * block
            if level > highest:
                highest, at = level, index
        elif kind != "compute":
            yield Segment(highest, at, level, kind, subject, size, index)
            level = highest = 0
            at = index
    yield Segment(highest, at, level, "", None, 0, len(events))
