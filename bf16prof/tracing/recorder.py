"""Puts the events of a model's modules between those of its storages, which the dry run's ledger
keeps in order anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bf16prof.dry_run.tracker import Tracker
from bf16prof.kernels import KernelCall
from bf16prof.models.autograd.events import GRADIENT, Event
from bf16prof.signatures.signature import SilentCall
from bf16prof.vocabulary import Label


@dataclass(frozen=True)
class Marked:
    """An event at a place in the ledger: before so many of its events."""

    position: int
    event: Event


@dataclass(frozen=True)
class Renamed:
    """From here on an allocation is for something else; a gradient (`is_given_away`) is the
    engine's, and ends when the engine says."""

    position: int
    index: int
    label: Label
    is_given_away: bool


@dataclass(frozen=True)
class Silent:
    """A call of a kernel that could have asked for scratch, and did not."""

    position: int
    label: Label
    call: KernelCall


class Recorder:
    """Told what happens, in order; `events` gives it back as a tape has it."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._ledger = tracker, tracker.ledger
        self._marks: list[Marked | Renamed | Silent] = []
        self._begin = self._first = 0
        self._not_ours: set[int] = set()
        self._calls: dict[int, KernelCall] = {}
        self.calls: dict[int, KernelCall] = {}
        """Of the events that are scratch of a kernel, by their place, what asked for it."""
        self.silent: list[SilentCall] = []
        """The calls that asked for nothing."""

    def start(self) -> None:
        """The pass that is recorded begins; everything before is forgotten."""
        self._begin = self._ledger.now().events
        self._first = len(self._ledger.allocations)
        self._marks.clear()

    def explain(self, call: KernelCall, label: Label, *, has_scratch: bool) -> None:
        """The scratch that was allocated just now is this call's; or it would have been, on another
        batch or length."""
        if has_scratch:
            self._calls[len(self._ledger.allocations) - 1] = call
        else:
            self._marks.append(Silent(self._ledger.now().events, label, call))

    def mark(self, kind: str, subject: Any = None, size: int = 0) -> None:
        """An event of a module or of the training loop."""
        self._marks.append(Marked(self._ledger.now().events, Event(kind, subject, size)))

    def give_away(self, tensor: Tensor) -> int:
        """A gradient belongs to the engine from now on: its bytes."""
        return self._rename(tensor, GRADIENT, is_given_away=True)

    def keep(self, tensor: Tensor, label: Label) -> int:
        """The training loop holds a tensor under this label: its bytes, or 0 for one that was there
        before."""
        return self._rename(tensor, label, is_given_away=False)

    def _rename(self, tensor: Tensor, label: Label, *, is_given_away: bool) -> int:
        position = self._ledger.now().events
        index = self._tracker.index_of(tensor)
        if index is None or index < self._first or index in self._not_ours:
            return 0
        known = [each for each in self._marks if isinstance(each, Renamed) and each.index == index]
        if not known:
            self._marks.append(Renamed(position, index, label, is_given_away))
        return 0 if known else self._ledger.allocations[index].bytes

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is allocated inside is the engine's business, from its beginning to its end."""
        before = len(self._ledger.allocations)
        try:
            yield
        finally:
            self._not_ours.update(range(before, len(self._ledger.allocations)))

    def events(self) -> list[Event]:
        """Everything since the start. What was there before it ends unseen: the loop and the engine
        are known to let go of it."""
        end = self._ledger.now().events
        labels: dict[int, Label] = {}
        given_away: set[int] = set()
        found: list[Event] = []
        marks = iter(self._marks)
        mark = next(marks, None)
        for position in range(self._begin, end + 1):
            while mark is not None and mark.position <= position:
                if isinstance(mark, Silent):
                    self.silent.append(SilentCall(len(found), mark.label, mark.call))
                else:
                    found += self._marked(mark, labels, given_away)
                mark = next(marks, None)
            if position < end:
                number = self._ledger.events[position]
                if (call := self._calls.get(abs(number) - 1)) is not None:
                    self.calls[len(found)] = call
                found += self._of_a_storage(number, labels, given_away)
        return found

    def _marked(self, mark: Marked | Renamed, labels: dict[int, Label], given_away: set[int]) -> list[Event]:
        if isinstance(mark, Marked):
            return [mark.event]
        size = self._ledger.allocations[mark.index].bytes
        old, labels[mark.index] = labels[mark.index], mark.label
        if mark.is_given_away:
            given_away.add(mark.index)
        return [Event("memory", old, -size), Event("memory", mark.label, size)]

    def _of_a_storage(self, number: int, labels: dict[int, Label], given_away: set[int]) -> list[Event]:
        index = abs(number) - 1
        allocation = self._ledger.allocations[index]
        if index < self._first or index in self._not_ours or not allocation.bytes or index in given_away:
            return []
        label = labels.setdefault(index, allocation.label)
        return [Event("memory", label, allocation.bytes if number > 0 else -allocation.bytes)]
