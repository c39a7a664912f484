"""What ZeRO-3's coordinator does at the events of a micro-step, written down once and played with
any activations.

It depends on the order of the events, not on the sizes of activations: another micro-batch or
length asks for the same gathers and releases at other levels. So a sweep runs the coordinator once,
and adds levels up from then on; a replay of the allocator asks for the same again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bf16prof.closed_form.gathers import Gathers
from bf16prof.closed_form.passes import Handler, Meter, Peak
from bf16prof.closed_form.program import ActivationStretch, Program
from bf16prof.closed_form.strategy import Launched
from bf16prof.vocabulary import Label, Phase

Held = Mapping[Label, int]

Call = tuple[str, Label, tuple[int, ...]]
"""What a meter is told: the name of a method of `Meter`, a label and sizes."""


class Action(NamedTuple):
    """One reaction: how its level changes, how far above the level before it goes and what is held
    then, what is held afterwards, and touches of a share of something: above which level, of how
    many bytes, for what, and what is held then. `calls`: all of it in turn."""

    change: int
    high: int
    held_at_high: Held
    held: Held
    shared: tuple[tuple[int, int, Label, Held], ...]
    calls: tuple[Call, ...]

    def tell(self, meter: Meter) -> None:
        """Another meter is told the same."""
        for name, label, sizes in self.calls:
            getattr(meter, name)(label, *sizes)


@dataclass(frozen=True)
class WrittenMicroStep:
    """A micro-step: before its first event, at each of its events, and after the last; `launched`:
    what was given to collectives.

    `sections`: of every section of the program the actions that do something, and the places of
    their segments.
    """

    start: Action
    actions: Sequence[Action]
    sections: Sequence[tuple[tuple[int, ...], tuple[Action, ...]]]
    finish: Action
    launched: Launched


class _Writer(Meter):
    """A meter of the engine alone, which cuts what happens into actions."""

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self._before, self._calls = 0, list[Call]()
        self._last: Held = {}
        self._nothing: Action | None = None
        """The action where nothing happens, which is that of most events."""
        self.peak = Peak()

    def take(self, label: Label, *sizes: int) -> None:
        """The engine allocates storages of these sizes."""
        if any(sizes):
            self._calls.append(("take", label, sizes))
            super().take(label, *sizes)

    def give(self, label: Label, *sizes: int) -> None:
        """The engine frees them."""
        if any(sizes):
            self._calls.append(("give", label, sizes))
            super().give(label, *sizes)

    def share(self, label: Label, *parts: int) -> None:
        """Each rank allocates its share of storages of so many bytes for a moment."""
        if any(parts):
            self._calls.append(("share", label, parts))
            super().share(label, *parts)

    def cut(self) -> Action:
        """What has happened since the last cut."""
        if not self._calls:
            self._nothing = self._nothing or Action(0, 0, self._last, self._last, (), ())
            return self._nothing
        peak, before = self.peak, self._before
        if self.held != self._last:
            self._last, self._nothing = dict(self.held), None
        shared = tuple((level - before, size, label, at.held) for level, size, label, at in peak.shared) if peak.shared else ()
        action = Action(self.level - before, peak.level - before, peak.held, self._last, shared, tuple(self._calls))
        self._before, self.peak, self._calls = self.level, Peak(self.level), []
        return action


class Writing:
    """The coordinator at work beside a meter of its own."""

    def __init__(self, block: int) -> None:
        self.meter = _Writer(block)

    def micro_step(self, program: Program, gathers: Gathers, handlers: Mapping[str, Handler], *, is_boundary: bool) -> WrittenMicroStep:
        """Write down one micro-step."""
        gathers.start(is_boundary=is_boundary)
        start = self.meter.cut()
        self.meter.phase = Phase.FORWARD
        actions: list[Action] = []
        sections = [self._section(section.shifted(shift), handlers, actions) for section, shift in program.sections]
        gathers.finish()
        finish = self.meter.cut()
        self.meter.phase = Phase.STEP
        return WrittenMicroStep(start, actions, sections, finish, gathers.launched)

    def _section(
        self, segments: Sequence[ActivationStretch], handlers: Mapping[str, Handler], actions: list[Action]
    ) -> tuple[tuple[int, ...], tuple[Action, ...]]:
        """Those that do something, and their places; all of them go to `actions`."""
        found: list[tuple[int, Action]] = []
        for place, segment in enumerate(segments):
            if segment.kind == "backward":
                self.meter.phase = Phase.BACKWARD
            if (handler := handlers.get(segment.kind)) is not None:
                handler(segment.subject, segment.bytes)
                actions.append(action := self.meter.cut())
                if action.calls:
                    found.append((place, action))
        return tuple(place for place, _ in found), tuple(action for _, action in found)


class Player:
    """Plays micro-steps that were written down beside the activations of a program, on a meter;
    `kinds`: the events with an action.

    Within a micro-step the meter's own `held` is what others hold; what the engine holds is added
    where it is looked at.
    """

    def __init__(self, program: Program, meter: Meter, kinds: frozenset[str]) -> None:
        self._program, self._meter, self._kinds = program, meter, kinds
        self._engine: Held = {}

    def play(self, step: WrittenMicroStep, others: Mapping[str, Handler]) -> None:
        """One micro-step; `others`: what the training loop and the libraries do at events (see
        `passes.walk`)."""
        meter, program = self._meter, self._program
        meter.held = self._whole({label: -size for label, size in self._engine.items()})
        self._act(step.start)
        meter.section = meter.events = 0
        self._begin(Phase.FORWARD)
        level, best, kinds = meter.level, meter.peak.level, self._kinds
        for index, ((section, _), (places, done)) in enumerate(zip(program.sections, step.sections, strict=True)):
            meter.section, actions = index, iter(done)
            for highest, at, net, kind, subject, size, end in section.merged(kinds, places):
                if level + highest > best:
                    best = level + highest
                    self._see(best, at)
                level += net
                if not kind:
                    continue
                meter.events, meter.level = end, level
                if kind == "backward":
                    meter.ends[Phase.FORWARD] = level
                    self._begin(Phase.BACKWARD)
                if kind in others:
                    self._others(others[kind], subject, size)
                if kind in kinds:
                    self._act(next(actions))
                level, best = meter.level, meter.peak.level
            meter.events = 0
        meter.level = level
        meter.section, meter.events = len(program.sections) - 1, len(program.sections[-1][0].events)
        self._act(step.finish)
        meter.held = self._whole(self._engine)

    def end(self, action: Action) -> None:
        """All micro-steps are over: `release_all`."""
        meter = self._meter
        meter.held = self._whole({label: -size for label, size in self._engine.items()})
        self._act(action)
        meter.held = self._whole(self._engine)

    def _begin(self, phase: Phase) -> None:
        known = self._meter.peaks.get(phase)
        before = -1 if known is None else known.level
        self._meter.begin(phase)
        if self._meter.peak.level > before:
            self._meter.peak.held = self._whole(self._engine)

    def _others(self, handler: Handler, subject: object, size: int) -> None:
        before = self._meter.peak.level
        handler(subject, size)
        if self._meter.peak.level > before:
            self._meter.peak.held = self._whole(self._engine)

    def _act(self, action: Action) -> None:
        meter, level = self._meter, self._meter.level
        if action.high and level + action.high > meter.peak.level:
            self._see(level + action.high, meter.events, action.held_at_high)
        for above, size, label, held in action.shared:
            if not any(known >= level + above and whole >= size for known, whole, *_ in meter.peak.shared):
                at = Peak(level + above, meter.section, meter.events, self._whole(held))
                meter.peak.shared.append((level + above, size, label, at))
        meter.level = level + action.change
        self._engine = action.held

    def _see(self, level: int, events: int, held: Held | None = None) -> None:
        peak = self._meter.peak
        peak.level, peak.section, peak.events = level, self._meter.section, events
        peak.held = self._whole(self._engine if held is None else held)

    def _whole(self, engine: Held) -> dict[Label, int]:
        """What all hold together."""
        held = dict(self._meter.held)
        for label, size in engine.items():
            held[label] = held.get(label, 0) + size
        return held


class Retelling:
    """In the place of the coordinator: what it did, told to another meter at the same events;
    `handlers` by their kinds."""

    def __init__(self, steps: Sequence[WrittenMicroStep], end: Action, kinds: Iterable[str], meter: Meter) -> None:
        self._steps, self._end, self._meter = iter(steps), end, meter
        self._actions: Iterator[Action] = iter(())
        self._finish = end
        self.handlers: dict[str, Handler] = dict.fromkeys(kinds, self._happens)

    def start(self, *, is_boundary: bool) -> None:
        """A micro-step begins, the last or not as when it was written."""
        step = next(self._steps)
        self._actions, self._finish = iter(step.actions), step.finish
        step.start.tell(self._meter)

    def finish(self) -> None:
        """It is over."""
        self._finish.tell(self._meter)

    def release_all(self) -> None:
        """The optimizer's step begins."""
        self._end.tell(self._meter)

    def _happens(self, *_: object) -> None:
        action = next(self._actions)
        if action.calls:
            action.tell(self._meter)
