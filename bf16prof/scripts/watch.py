"""Watches the engines that a script builds: sets phase marks, counts steps, and tells an observer.

A step of the job ends where an engine has updated its weights and all engines that took part in the step before have done so as well: with
one engine, at every update; with two that are trained in turn, after both.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

from bf16prof.engine.phases import PhaseMarks
from bf16prof.records import Phase

WAITS_FOR = 16
"""Updates of one engine after which those that have not made any in this step are no longer waited for."""


class Observer(Protocol):
    """Who wants to know what a script's engines do. All calls come from the thread that trains."""

    def built(self, engine: Any, *, zero_init: bool) -> None:
        """`deepspeed.initialize` is about to return this engine; init is still the open phase.

        `zero_init`: its model was partitioned already.
        """
        ...

    def called(self, engine: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """The forward pass of an engine begins with these arguments; forward is the open phase."""
        ...

    def stepped(self, engine: Any, frame: FrameType) -> None:
        """A step of the job is over; no phase is open. `frame` is the one that called `engine.step`. It may raise to end the script."""
        ...


class Watch:
    """The engines of this process and the marks of their phases. Init is open from the beginning to the end of `deepspeed.initialize`."""

    def __init__(self, marks: PhaseMarks, observer: Observer) -> None:
        self.marks = marks
        self.engines: list[Any] = []
        self.steps = 0
        """Steps of the job that are over."""
        self._observer = observer
        self._inside = 0
        self._waited_for: frozenset[int] = frozenset()
        self._updates: dict[int, int] = {}

    def begin(self) -> None:
        """Open the init phase: everything before the first engine."""
        self.marks.mark(Phase.INIT)

    def building(self) -> None:
        """`deepspeed.initialize` has been called."""
        if self.engines:
            self.marks.mark(Phase.INIT)

    def built(self, engine: Any, *, zero_init: bool = False) -> None:
        """`deepspeed.initialize` returns this engine."""
        self.add(engine)
        self._observer.built(engine, zero_init=zero_init)
        self.marks.mark(None)

    def add(self, engine: Any) -> None:
        """Watch an engine from now on."""
        self.engines.append(engine)
        engine.register_forward_pre_hook(functools.partial(self._forward, engine), with_kwargs=True)
        engine.module.register_forward_pre_hook(self._evaluation)
        if not is_pipeline(engine):  # it refuses these, and runs instructions of its own (`hooks.py`)
            engine.backward = self._inside_phase(engine.backward, Phase.BACKWARD)
            engine.step = self._stepping(engine, engine.step)

    @property
    def is_inside(self) -> bool:
        """Whether an engine's own backward or step runs now."""
        return self._inside > 0

    def instruction(self, phase: Phase, method: Callable[..., Any]) -> Callable[..., Any]:
        """A pipeline engine's instruction that marks its phase."""

        @functools.wraps(method)
        def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
            inside = self._inside_phase(functools.partial(method, engine), phase)
            return self._step(engine, inside, args, kwargs, is_update=True) if phase is Phase.STEP else inside(*args, **kwargs)

        return call

    def backward_begins(self) -> None:
        """`torch.autograd.backward` has been called by somebody: by a script that trains without `engine.backward`, if by no engine."""
        if self.engines and not self._inside and self.marks.phase in (Phase.FORWARD, None) and not in_backward():
            self.marks.mark(Phase.BACKWARD)

    def _forward(self, engine: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():  # checkpointing of everything runs it again
            return
        self.marks.mark(Phase.FORWARD)
        self._observer.called(engine, args, kwargs)

    def _evaluation(self, *_: Any) -> None:
        """A model is called between steps without its engine, as an evaluation may do."""
        if self.marks.phase is None and not in_backward():
            self.marks.mark(Phase.FORWARD)

    def _inside_phase(self, method: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.marks.mark(phase)
            self._inside += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._inside -= 1

        return call

    def _stepping(self, engine: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        inside = self._inside_phase(method, Phase.STEP)

        @functools.wraps(method)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._step(engine, inside, args, kwargs, is_update=engine.is_gradient_accumulation_boundary())

        return step

    def _step(self, engine: Any, inside: Callable[..., Any], args: Any, kwargs: Any, *, is_update: bool) -> Any:
        result = inside(*args, **kwargs)
        self.marks.mark(None)
        if is_update and self._ends_a_step(engine):
            self.steps += 1
            self._observer.stepped(engine, sys._getframe(2))
        return result

    def _ends_a_step(self, engine: Any) -> bool:
        """Whether this update is the last that its step waits for."""
        key = id(engine)
        self._updates[key] = self._updates.get(key, 0) + 1
        if not self._waited_for <= self._updates.keys() and max(self._updates.values()) < WAITS_FOR:
            return False
        self._waited_for, self._updates = frozenset(self._updates), {}
        return True


def is_pipeline(engine: Any) -> bool:
    """Whether it is one of DeepSpeed's pipeline engines."""
    return any(base.__name__ == "PipelineEngine" for base in type(engine).__mro__)


def in_backward() -> bool:
    """Whether autograd is running in this thread."""
    import torch

    return torch._C._current_graph_task_id() != -1
