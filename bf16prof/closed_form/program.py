"""The events of a whole forward and backward pass, from the tape of a few layers: between the first
and the last they repeat.

Events between two events that concern the engine (a gradient is there, a module is entered) are put
together to a `Segment`.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bf16prof.cases import Job
from bf16prof.engine.config import EngineFacts
from bf16prof.models.autograd.events import BEFORE, BEHIND, NO_LAYER, Event, ParameterKey, SectionKey
from bf16prof.models.autograd.tape import Precision, Tape
from bf16prof.models.tapes import ForwardRun, OwnNetwork
from bf16prof.reductions import processor_of
from bf16prof.rounding import round_up
from bf16prof.signatures.signature import Signature
from bf16prof.vocabulary import Label


class ActivationStretch(NamedTuple):
    """What happens to activations up to the next event for the engine: the highest, after how many
    events, the change, and that event."""

    highest: int
    at: int
    net: int
    kind: str
    subject: Any
    bytes: int
    end: int


_NUMBERS: dict[Hashable, int] = {}


def number_of(content: Hashable) -> int:
    """A number for some content, the same for equal ones: it is compared faster."""
    return _NUMBERS.setdefault(content, len(_NUMBERS))


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the tape: a layer's forward or backward pass, or what lies before, between and
    after the layers."""

    events: Sequence[Event]
    segments: Sequence[ActivationStretch]

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
    def operations(self) -> Mapping[str, int]:
        """Operations of its matrix products in each part of a micro-step: `forward`, `backward`, or
        `recomputed`."""
        found: dict[str, int] = {}
        for kind, part, count in self.events:
            if kind == "compute":
                found[part] = found.get(part, 0) + count
        return found

    @functools.cached_property
    def of_the_engine(self) -> int:
        """A number for the events that an engine hears of; sections with the same events have the
        same."""
        return number_of(tuple((each.kind, each.subject, each.bytes) for each in self.segments if each.kind))

    @functools.cached_property
    def _shifted(self) -> dict[int, Sequence[ActivationStretch]]:
        return {0: self.segments}

    @functools.cached_property
    def _merged(self) -> dict[Hashable, Sequence[ActivationStretch]]:
        return {}

    def merged(self, kinds: frozenset[str], places: tuple[int, ...]) -> Sequence[ActivationStretch]:
        """The segments; one that ends with an event of these kinds is part of the next, but for
        those at these places."""
        if (kinds, places) not in self._merged:
            self._merged[kinds, places] = list(self._put_together(kinds, set(places)))
        return self._merged[kinds, places]

    def _put_together(self, kinds: frozenset[str], places: set[int]) -> Iterator[ActivationStretch]:
        level = highest = at = 0
        for place, each in enumerate(self.segments):
            if level + each.highest > highest:
                highest, at = level + each.highest, each.at
            level += each.net
            if each.kind not in kinds or place in places:
                yield each._replace(highest=highest, at=at, net=level)
                level = highest = 0

    def shifted(self, layers: int) -> Sequence[ActivationStretch]:
        """The segments so many layers further on."""
        if layers not in self._shifted:
            self._shifted[layers] = [
                each if each.subject is None else each._replace(subject=_shift(each.subject, layers)) for each in self.segments
            ]
        return self._shifted[layers]


@dataclass(frozen=True, eq=False)
class Program:
    """Sections in the order in which they run, each with how many layers further on it runs than on
    the tape."""

    sections: Sequence[tuple[Section, int]]

    @functools.cached_property
    def net(self) -> dict[Label, int]:
        """By label, what a micro-step leaves: the logits, and gradients where the engine has not
        taken them."""
        sizes: dict[Label, int] = {}
        for section, _ in self.sections:
            for label, size in section.net.items():
                sizes[label] = sizes.get(label, 0) + size
        return {label: size for label, size in sizes.items() if size}

    @functools.cached_property
    def operations(self) -> Mapping[str, int]:
        """Operations of the matrix products of a micro-step in each part of it: `forward`,
        `backward`, or `recomputed`."""
        found: dict[str, int] = {}
        for section, _ in self.sections:
            for part, count in section.operations.items():
                found[part] = found.get(part, 0) + count
        return found

    @functools.cached_property
    def of_the_engine(self) -> tuple[tuple[int, int], ...]:
        """What an engine hears of: the same for programs whose activations alone differ."""
        return tuple((section.of_the_engine, shift) for section, shift in self.sections)

    def modules(self) -> Iterator[ParameterKey]:
        """The modules in the order in which they are entered, forwards and backwards: ZeRO-3's
        trace."""
        for section, shift in self.sections:
            for segment in section.segments:
                if segment.kind in {"fetch", "fetch backward"}:
                    yield segment.subject.shifted(shift)


def shifted(subject: Any, layers: int) -> Any:
    """The subject of an event so many layers further on."""
    return subject if subject is None or not layers else _shift(subject, layers)


def _shift(subject: Any, layers: int) -> Any:
    if isinstance(subject, ParameterKey):
        return subject.shifted(layers)
    if isinstance(subject, tuple) and isinstance(subject[0], ParameterKey):  # a view of a parameter, by its number
        key, number = subject
        return key.shifted(layers), (number, layers)
    return subject


def run_of(job: Job, facts: EngineFacts) -> ForwardRun:
    """What a job's forward passes are run on."""
    work, capability = job.profile.workload, job.gpu.compute_capability if job.gpu else None
    return ForwardRun(
        job.profile.model,
        work.micro_batch_size,
        work.sequence_length,
        work.activation_checkpointing,
        capability,
        facts.parameter_dtype,
        work.keeps_outputs,
        processor_of(job.gpu),
    )


@functools.lru_cache(maxsize=16)
def recorded(signature: Signature, block: int) -> Program:
    """The program of a micro-batch as it was recorded, all layers of it."""
    return Program([(Section(signature.events, list(_segments(signature.events, block))), 0)])


@functools.cache
def program(run: ForwardRun, precision: Precision, zero3: bool, memory_efficient_linear: bool, block: int) -> Program:
    """The program of a micro-batch. `block`: the allocator's block size (1: it does not round)."""
    stand_ins = list(enumerate(_taped(OwnNetwork(run).model.num_layers)))
    tape = Tape(precision, zero3=zero3, memory_efficient_linear=memory_efficient_linear, processor=run.processor)
    parts = _parts(record(run, tape, sorted({taken for _, taken in stand_ins})))
    sections = {key: Section(part, list(_segments(part, block))) for key, part in parts.items()}

    def outside(kind: str, place: str) -> tuple[Section, int]:
        return sections[SectionKey(kind, place)], 0

    def of_layers(kind: str) -> list[tuple[Section, int]]:
        return [(sections[SectionKey(kind, taken)], layer - taken) for layer, taken in stand_ins]

    forward = [outside("forward", BEFORE), *of_layers("forward"), outside("forward", BEHIND)]
    backward = [outside("backward", BEHIND), *reversed(of_layers("backward")), outside("backward", BEFORE)]
    return Program([*forward, *of_layers("forget"), *backward])


def _taped(layers: int) -> list[int]:
    """For every layer the one that is on the tape for it: the first and the last stand for
    themselves, the second for all others."""
    return [layer if layer in (0, layers - 1) else 1 for layer in range(layers)]


def record(run: ForwardRun, tape: Tape, layers: Sequence[int]) -> list[Event]:
    """The events of a forward and backward pass through these layers alone, on an empty tape."""
    loss = OwnNetwork(run).loss(tape, layers)
    _leave_autocast(tape, layers)
    tape.mark("backward")
    tape.phase = "backward"
    tape.backward(loss, tape.new(1, loss.itemsize, "ones_like"))
    return list(tape.events)


def _leave_autocast(tape: Tape, layers: Sequence[int]) -> None:
    """Forget the casts of weights, those of layers in a section of each; then backward begins."""
    _forget(tape, NO_LAYER)
    for layer in layers:
        tape.mark("cut", SectionKey("forget", layer))
        _forget(tape, layer)
    tape.mark("cut", SectionKey("backward", BEHIND))


def _forget(tape: Tape, layer: int) -> None:
    for key in [key for key in tape.casts if key.layer == layer]:
        del tape.casts[key]


def _parts(events: Sequence[Event]) -> dict[SectionKey, list[Event]]:
    parts: dict[SectionKey, list[Event]] = {}
    part = parts[SectionKey("forward", BEFORE)] = []
    for event in events:
        if event.kind == "cut":
            part = parts[event.subject] = []
        else:
            part.append(event)
    return parts


def _segments(events: Sequence[Event], block: int) -> Iterator[ActivationStretch]:
    level = highest = at = 0
    for index, (kind, subject, size) in enumerate(events, 1):
        if kind == "memory":
            level += round_up(size, block) if size > 0 else size // block * block
            if level > highest:
                highest, at = level, index
        elif kind != "compute":
            yield ActivationStretch(highest, at, level, kind, subject, size, index)
            level = highest = 0
            at = index
    yield ActivationStretch(highest, at, level, "", None, 0, len(events))
