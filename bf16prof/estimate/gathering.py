"""How often ZeRO-3 gathers each parameter in one micro-step: its coordinator, replayed over the order of calls.

From the second step on the coordinator knows the order in which modules come (its trace). It fetches what a module needs, prefetches
along the trace, and releases after each module what is not needed again within `max_reuse_distance`, nor has been passed over by a
prefetch because it was there (DeepSpeed 0.19.8, `zero/partitioned_param_coordinator.py`: fetch_sub_module, release_sub_module,
__params_to_release).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.models.execution import Call, Execution, execution
from bf16prof.models.shapes import inventory
from bf16prof.profiles.models import ModelSettings
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.records import Phase

Event = tuple[Phase, bool, tuple[int, ...]]
"""A phase, whether the module's parameters are fetched (else released), and which they are."""


@dataclass(frozen=True)
class Gathering:
    """The launches of one micro-step in one phase, each a tuple of parameters (positions in the inventory) that are gathered together."""

    forward: tuple[tuple[int, ...], ...]
    backward: tuple[tuple[int, ...], ...]


@functools.cache
def gathering(model: ModelSettings, checkpointing: bool, zero: ZeroSettings) -> Gathering:
    """What is gathered in forward and in backward of a step that repeats."""
    numels = [spec.numel for spec in inventory(model)]
    events = _events(execution(model), checkpointing)
    coordinator = _Coordinator(numels, events, zero)
    for event in events:
        coordinator.take(event)
    return Gathering(*(tuple(coordinator.launches[phase]) for phase in (Phase.FORWARD, Phase.BACKWARD)))


def persistent_indices(numels: Sequence[int], zero: ZeroSettings) -> frozenset[int]:
    """Positions of the parameters that stay gathered (`zero/parameter_offload.py`, mark_persistent_parameters)."""
    kept, total = set(), 0
    for index, n in enumerate(numels):
        if n <= zero.param_persistence_threshold and n + total <= zero.model_persistence_threshold:
            kept.add(index)
            total += n
    return frozenset(kept)


def _events(order: Execution, checkpointing: bool) -> list[Event]:
    """Fetches and releases of one micro-step. Backward visits modules in reverse, each after the one that contains it.

    An embedding's backward begins, but as its input needs no gradient it never ends: it is fetched, and released only with the step.
    """
    events: list[Event] = [(Phase.FORWARD, True, ())]
    for call in (*order.before, *order.blocks, *order.after):
        events += _forward(call, Phase.FORWARD)
    events += [(Phase.BACKWARD, True, ()), *_backward(order.after)]
    for block in reversed(order.blocks):
        events += _recomputed(block) if checkpointing else _backward([block])
    return events + [(Phase.BACKWARD, True, call.parameters) for call in reversed(order.before)]


def _forward(call: Call, phase: Phase) -> list[Event]:
    inside = [event for inner in call.inside for event in _forward(inner, phase)]
    return [(phase, True, call.parameters), *inside, (phase, False, call.parameters)]


def _backward(calls: Sequence[Call]) -> list[Event]:
    events: list[Event] = []
    for call in reversed(calls):
        events += [(Phase.BACKWARD, True, call.parameters), *_backward(call.inside), (Phase.BACKWARD, False, call.parameters)]
    return events


def _recomputed(block: Call) -> list[Event]:
    """The last module's backward begins; what it needs is gone, so the block runs again, its last module to the point where it is there."""
    events = _backward([block])
    begun = next(i for i, (_, fetched, _) in enumerate(events) if not fetched)
    again = _forward(block, Phase.BACKWARD)
    stopped = max(i for i, (_, fetched, _) in enumerate(again) if fetched) + 1
    return [*events[:begun], *again[:stopped], *events[begun:]]


class _Coordinator:
    """State of DeepSpeed's coordinator: what is available, where in the trace it is, and what it has prefetched for when."""

    def __init__(self, numels: Sequence[int], events: Sequence[Event], zero: ZeroSettings) -> None:
        self._numels, self._zero = numels, zero
        self._trace = [parameters for _, fetched, parameters in events if fetched]
        self._queue = collections.deque((p, step) for step, parameters in enumerate(self._trace) for p in sorted(set(parameters)))
        self._persistent = persistent_indices(numels, zero)
        self._available = set(self._persistent)
        self._live = 0
        self._step = 0
        self._fetched_for: dict[int, int] = {}
        self._starts, self._uses = self._positions()
        self.launches: dict[Phase, list[tuple[int, ...]]] = {Phase.FORWARD: [], Phase.BACKWARD: []}

    def _positions(self) -> tuple[list[int], dict[int, list[int]]]:
        """Elements in the trace before each of its modules, and the steps at which each parameter is used."""
        starts, uses = [0], collections.defaultdict(list)
        for step, parameters in enumerate(self._trace):
            starts.append(starts[-1] + sum(self._numels[p] for p in parameters))
            for p in parameters:
                uses[p].append(step)
        return starts, uses

    def take(self, event: Event) -> None:
        """One event of the micro-step."""
        phase, fetched, parameters = event
        if fetched:
            self._gather(phase, parameters)
            self._pop(parameters)
            self._prefetch(phase)
            self._step += 1
        else:
            self._release(parameters)

    def _gather(self, phase: Phase, parameters: Sequence[int]) -> None:
        missing = tuple(p for p in parameters if p not in self._available)
        if missing:
            self.launches[phase].append(missing)
            self._available.update(missing)
            self._live += sum(self._numels[p] for p in missing)

    def _pop(self, parameters: Sequence[int]) -> None:
        """Take what the module needs off the queue, unless a prefetch has."""
        waiting = {p for p in parameters if self._fetched_for.get(p, -1) < self._step}
        popped: set[int] = set()
        while self._queue and len(popped) < len(waiting):
            p, step = self._queue.popleft()
            self._fetched_for[p] = step
            popped.add(p)

    def _prefetch(self, phase: Phase) -> None:
        room = min(self._zero.max_live_parameters - self._live, self._zero.prefetch_bucket_size)
        chosen: dict[int, None] = {}
        size = 0
        while self._queue and size < room:
            p, step = self._queue.popleft()
            self._fetched_for[p] = max(self._fetched_for.get(p, -1), step)
            if p not in self._available and p not in chosen:
                chosen[p] = None
                size += self._numels[p]
        self._gather(phase, tuple(chosen))

    def _release(self, parameters: Sequence[int]) -> None:
        for p in parameters:
            kept = p in self._persistent or self._fetched_for.get(p, -1) > self._step or self._reused_soon(p)
            if p in self._available and not kept:
                self._available.remove(p)
                self._live -= self._numels[p]

    def _reused_soon(self, p: int) -> bool:
        """Whether fewer than `max_reuse_distance` elements lie between here and the module that uses the parameter next."""
        following = next((step for step in self._uses[p] if step >= self._step), None)
        return following is not None and self._starts[following] - self._starts[self._step] < self._zero.max_reuse_distance
