"""Micro-steps of gradient accumulation that need not be run, because they would do exactly what the
last one did.

A micro-step is the same as the one before it if it asked for the same storages, on the same
streams, freed the same ones in the same order (its own, or those that the one before it left), and
set the same phase marks. The next one is the same again if the engine is in the same state:
`state_of` walks all that DeepSpeed's objects and the model hold. Numbers that count on evenly
(`micro_steps`) may differ; they are moved on over what is left out. Anything else that differs, and
every micro-step is run.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bf16prof.dry_run.ledger import Instant, Ledger
from bf16prof.dry_run.repeat import Body, kind, stream_uses
from bf16prof.dry_run.tracker import Tracker

COMPARED = 3
"""So many states in a row are compared: numbers that count on do so by the same amount twice."""
LAST_TRY = 8
"""A micro-step that is not like the one before it by then never will be."""

Path = tuple[Hashable, ...]
Place = tuple[Any, Any]
"""A container and a key: where a number is."""


@dataclass(frozen=True)
class MicroStep:
    """What a micro-step did, in terms that do not depend on which it is, and the state that it
    left."""

    body: Body
    events: tuple[Any, ...]
    state: Mapping[Path, Any]
    counters: Mapping[Path, Place]


class MicroSteps:
    """Watches the micro-steps of an optimizer step go by."""

    def __init__(self, engines: Sequence[Any], tracker: Tracker) -> None:
        self._engines, self._tracker, self._ledger = engines, tracker, tracker.ledger
        self._seen: deque[MicroStep] = deque(maxlen=COMPARED)
        self._starts: list[Instant] = []
        self._emptied = 0

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self._seen.clear()
        self._starts = [self._ledger.now()]
        self._emptied = self._ledger.emptied

    def body(self, number: int) -> Body | None:
        """Micro-step `number` (from 0), which is over, if the next one would do exactly the
        same."""
        self._starts.append(self._ledger.now())
        if number == 0 or number > LAST_TRY or self._ledger.emptied != self._emptied:
            return None
        body = Body.of(self._ledger, *self._starts[-3:])
        counters: dict[Path, Place] = {}
        state = dict(state_of(self._engines, self._tracker, body, counters))
        self._seen.append(MicroStep(body, tuple(events_of(self._ledger, body)), state, counters))
        return body if len(self._seen) == COMPARED and self._repeats() else None

    def move_on(self, count: int) -> None:
        """So many micro-steps have been left out: let everything that counts them say so."""
        _, before, last = self._seen
        for path, (container, key) in last.counters.items():
            if step := last.state[path] - before.state[path]:
                _set(container, key, last.state[path] + step * count)

    def _repeats(self) -> bool:
        first, before, last = self._seen
        if last.events != before.events or not first.state.keys() == before.state.keys() == last.state.keys():
            return False
        for path, value in last.state.items():
            one, two = first.state[path], before.state[path]
            counts_on = path in last.counters and type(one) is type(two) is type(value) is int and two - one == value - two
            if not (one == two == value or counts_on):
                return False
        return True


def events_of(ledger: Ledger, body: Body) -> Iterator[Any]:
    """The events, stream uses and marks of a micro-step; storages by their number in it or in the
    one before."""
    start, end = body.start, body.end
    for event in ledger.events[start.events : end.events]:
        yield kind(ledger.allocations[event - 1]) if event > 0 else body.name(-event - 1)
    for position, uses in stream_uses(ledger, start, end).items():
        yield position - start.events, tuple((body.name(index), stream) for index, stream in uses)
    for mark in ledger.marks[start.marks : end.marks]:
        yield mark.event - start.events, mark.phase


def state_of(engines: Sequence[Any], tracker: Tracker, body: Body, counters: dict[Path, Place]) -> Iterator[tuple[Path, Any]]:
    """Everything that engines hold, by the path to it: values as they are, tensors by shape, dtype
    and the number of their storage.

    Walks containers, and the objects of DeepSpeed, of the model and of optimizers; of everything
    else there is the type. Clocks are left out. `counters`: where DeepSpeed's whole numbers are.
    One of the model's may decide what it does next, so it must not change.
    """
    yield ("host",), tracker.host_bytes
    waiting: list[tuple[Path, Any, Place | None]] = [((number,), engine, None) for number, engine in enumerate(engines)]
    seen: set[int] = set()
    while waiting:
        path, value, place = waiting.pop()
        if value is None or isinstance(value, VALUES):
            if type(value) is int and place is not None:
                counters[path] = place
            yield path, value
        elif id(value) not in seen:
            seen.add(id(value))
            said, inner, its_own = _look_into(value, tracker, body, is_deepspeeds=place is not None)
            yield path, (said, len(inner))
            for index, (key, each) in enumerate(inner.items()):
                name = key if isinstance(key, str | int) else index
                waiting.append(((*path, name), each, (value, key) if key in its_own else None))


VALUES = (bool, int, float, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
"""What is compared as it is."""

OF_TENSORS = ("ds_", "grad_acc")
"""How the attributes of tensors begin that DeepSpeed gives them."""

OF_MODULES = {"applied_pre_backward_ref_cnt", "ds_grads_remaining"}
"""Numbers that DeepSpeed gives to modules (zero/parameter_offload.py)."""


def _look_into(value: Any, tracker: Tracker, body: Body, *, is_deepspeeds: bool) -> tuple[Any, Mapping[Any, Any], Collection[Any]]:
    """What there is to say of something that is no plain value, what it holds by key, and under
    which keys that is DeepSpeed's own."""
    if isinstance(value, Tensor):
        held = {name: each for name, each in vars(value).items() if name.startswith(OF_TENSORS)}
        return (value.shape, value.dtype, _storage(value, tracker, body)), held | {"grad": value.grad}, held
    if isinstance(value, Mapping | list | tuple | deque):
        inner = value if isinstance(value, Mapping) else dict(enumerate(value))
        return "", inner, inner if is_deepspeeds and not isinstance(value, tuple) else ()
    if isinstance(value, set | frozenset):  # in no order that could be compared
        return len(value), {}, ()
    module = type(value).__module__
    if module.startswith("deepspeed.") and module not in CLOCKS:
        inner = getattr(value, "__dict__", {})
        return "", inner, inner
    if isinstance(value, nn.Module | torch.optim.Optimizer):
        return "", vars(value), OF_MODULES
    return type(value).__name__, {}, ()


CLOCKS = {"deepspeed.utils.timer", "deepspeed.monitor.monitor"}
"""Modules whose objects hold times, which no memory depends on."""


def _storage(tensor: Tensor, tracker: Tracker, body: Body) -> Any:
    index = tracker.index_of(tensor)
    return None if index is None else body.name(index)


def _set(container: Any, key: Any, value: int) -> None:
    if isinstance(container, MutableMapping | list | deque):
        container[key] = value
    else:
        vars(container)[key] = value
