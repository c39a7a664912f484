"""Forward and backward: the activations of a `Program` and, at its events, what the engine
allocates and frees beside them.

An engine strategy (`closed_form/gradients.py`, `closed_form/gathers.py`) is told of every event.
Levels are bytes above what is allocated between steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bf16prof.closed_form.program import Program
from bf16prof.rounding import ceil_div, round_up
from bf16prof.vocabulary import Label, Phase

REMEMBERED = 512
"""So many walks, and places in a program, are remembered."""


@dataclass
class Peak:
    """The highest level of a phase: where in the program it is reached, and what the engine holds
    beside the activations then."""

    level: int = 0
    section: int = 0
    events: int = 0
    held: dict[Label, int] = field(default_factory=dict)
    shared: list[tuple[int, int, Label, Peak]] = field(default_factory=list)
    """Levels that touches of this many bytes, divided by the number of ranks, come on top of: with
    the label, and where that is."""


class Meter:
    """Bytes above the steady state, and the peaks of the phases."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.level = 0
        self.held: dict[Label, int] = {}
        self.peaks: dict[Phase, Peak] = {}
        self.ends: dict[Phase, int] = {}
        self.peak = Peak()
        self.phase = Phase.INIT
        self.section = self.events = 0
        self.log: list[Any] | None = None
        """Where it is kept: the peaks between interruptions, each with its phase, and what
        interrupted."""

    def copy(self) -> Meter:
        """The same levels and peaks, to go on from."""
        other = Meter(self.block)
        other.level, other.held, other.ends, other.phase = self.level, dict(self.held), dict(self.ends), self.phase
        other.peaks = {phase: dataclasses.replace(peak) for phase, peak in self.peaks.items()}
        other.peak = other.peaks.get(self.phase, Peak())
        other.section, other.events = self.section, self.events
        return other

    def begin(self, phase: Phase) -> None:
        """A phase begins, or begins again in the next micro-step."""
        self.phase = phase
        self.peak = self.peaks.setdefault(phase, Peak(-1)) if self.log is None else self._logged()
        self.see(self.level, self.events)

    def interrupt(self, moment: object) -> None:
        """Something happens that is filled in later: what comes after it is measured apart."""
        assert self.log is not None, "a meter that is interrupted keeps a log"
        self.log.append(moment)
        self.begin(self.phase)

    def _logged(self) -> Peak:
        assert self.log is not None
        peak = Peak(-1)
        self.log.append((self.phase, peak))
        return peak

    def see(self, level: int, events: int) -> None:
        """A level has been reached after so many events of the section."""
        if level > self.peak.level:
            self.peak.level, self.peak.section, self.peak.events, self.peak.held = level, self.section, events, dict(self.held)

    def take(self, label: Label, *sizes: int) -> None:
        """The engine allocates storages of these sizes."""
        block, total = self.block, 0
        for size in sizes:
            total += -(-size // block) * block
        if total:
            self.level += total
            self.held[label] = self.held.get(label, 0) + sum(sizes)
            if self.level > self.peak.level:
                self.see(self.level, self.events)

    def give(self, label: Label, *sizes: int) -> None:
        """The engine frees them."""
        block, total = self.block, 0
        for size in sizes:
            total += -(-size // block) * block
        if total:
            self.level -= total
            self.held[label] = self.held.get(label, 0) - sum(sizes)

    def exchange(self, old: Label, new: Label, pairs: Iterable[tuple[int, int]]) -> None:
        """One after the other, the engine allocates the second of each pair and frees the first."""
        block, level, best, given, taken = self.block, self.level, self.peak.level, 0, 0
        for before, after in pairs:
            level += -(-after // block) * block
            given, taken = given + before, taken + after
            if level > best:
                best = level
                self.peak.held = self.held | {old: self.held.get(old, 0) - given + before, new: self.held.get(new, 0) + taken}
            level -= -(-before // block) * block
        self.level, self.peak.level = level, best
        self.held[old] = self.held.get(old, 0) - given
        self.held[new] = self.held.get(new, 0) + taken

    def touch(self, label: Label, *sizes: int) -> None:
        """The engine allocates them for a moment."""
        self.take(label, *sizes)
        self.give(label, *sizes)

    def share(self, label: Label, *parts: int) -> None:
        """Each rank allocates its share of storages of so many bytes for a moment (see
        `resolve`)."""
        whole = sum(parts)
        if whole and not any(level >= self.level and size >= whole for level, size, *_ in self.peak.shared):
            self.peak.shared.append((self.level, whole, label, Peak(self.level, self.section, self.events, dict(self.held))))

    def empty_cache(self) -> None:
        """DeepSpeed empties the allocator's cache, which moves no level (see `replay.py`)."""

    def updates(self, tensors: int) -> None:
        """The optimizer updates so many tensors. What it makes the first time is counted as there
        already (see `replay.py`)."""

    def resolve(self, ranks: int) -> None:
        """Raise the peaks to what touches of a part of something reach on so many ranks."""
        for phase, peak in self.peaks.items():
            if not peak.shared:
                continue
            level, whole, label, at = max(peak.shared, key=lambda each: each[0] + each[1] / ranks)
            part = ceil_div(whole, ranks)
            highest = level + round_up(part, self.block)
            if highest > peak.level:
                self.peaks[phase] = Peak(highest, at.section, at.events, at.held | {label: at.held.get(label, 0) + part})
        self.peak = self.peaks[self.phase]

    def fold(self, sizes: Mapping[Label, int]) -> None:
        """What a micro-step leaves belongs to what is held from now on."""
        for label, size in sizes.items():
            self.held[label] = self.held.get(label, 0) + size


Handler = Callable[[Any, int], None]


def walk(program: Program, meter: Meter, handlers: Mapping[str, Handler]) -> None:
    """One micro-step: forward and backward once."""
    meter.section = meter.events = 0
    meter.begin(Phase.FORWARD)
    for index, (section, shift) in enumerate(program.sections):
        meter.section = index
        for highest, at, net, kind, subject, size, end in section.shifted(shift):
            if meter.level + highest > meter.peak.level:
                meter.see(meter.level + highest, at)
            meter.level += net
            if not kind:
                continue
            meter.events = end
            if kind == "backward":
                meter.ends[Phase.FORWARD] = meter.level
                meter.begin(Phase.BACKWARD)
            if kind in handlers:
                handlers[kind](subject, size)
        meter.events = 0
    meter.section, meter.events = len(program.sections) - 1, len(program.sections[-1][0].events)


def close(program: Program, meter: Meter) -> None:
    """A micro-step is over."""
    meter.ends[Phase.BACKWARD] = meter.level
    meter.fold(program.net)


@functools.lru_cache(maxsize=REMEMBERED)
def activations(program: Program, section: int, events: int) -> Mapping[Label, int]:
    """By label, the activations after so many events of a section."""
    sizes: dict[Label, int] = {}
    parts = [before.net for before, _ in program.sections[:section]]
    for part in (*parts, program.sections[section][0].sizes(events)):
        for label, size in part.items():
            sizes[label] = sizes.get(label, 0) + size
    return {label: size for label, size in sizes.items() if size}
