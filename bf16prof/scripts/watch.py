"""Watches the engines that a script builds: sets phase marks, counts steps, and tells an observer.

A step of the job ends where an engine has updated its weights and all engines that took part in the
step before have done so as well: with one engine, at every update; with two that are trained in
turn, after both.

A forward pass is one of an evaluation where the engine itself says so: its model is in eval mode
and gradients are off. An evaluation lasts until the next phase begins: what a script keeps of its
batches belongs to it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

from bf16prof.vocabulary import Phase

WAITS_FOR = 16
"""Updates of one engine after which those that have not made any in this step are no longer waited
for."""


class Observer(Protocol):
    """Who wants to know what a script's engines do. All calls come from the thread that trains."""

    def built(self, engine: Any, *, zero_init: bool) -> None:
        """`deepspeed.initialize` is about to return this engine; init is still the open phase.

        `zero_init`: its model was partitioned already.
        """
        ...

    def called(self, engine: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """The forward pass of an engine begins with these arguments; forward is the open phase.
        Nobody is told of an evaluation's."""
        ...

    def goes_backward(self, loss: Any) -> None:
        """`engine.backward` is called with this, or `backward` of it where no engine's is running;
        forward is still the open phase."""
        ...

    def stepped(self, engine: Any, frame: FrameType) -> None:
        """A step of the job is over; no phase is open. `frame` is the one that called
        `engine.step`. It may raise to end the script."""
        ...


class Marks(Protocol):
    """Who is told of phases."""

    @property
    def phase(self) -> Phase | None:
        """The open one."""
        ...

    def mark(self, phase: Phase | None) -> None:
        """Close the open phase and open this one (`None`: open none)."""
        ...


class Watch:
    """The engines of this process and the marks of their phases. Init is open from the beginning to
    the end of `deepspeed.initialize`."""

    def __init__(self, marks: Marks, observer: Observer) -> None:
        self.marks = marks
        self.engines: list[Any] = []
        self.steps = 0
        """Steps of the job that are over."""
        self._observer = observer
        self._inside = 0
        self._is_over = False
        self._undo: list[Callable[[], None]] = []
        self._waited_for: frozenset[int] = frozenset()
        self._updates: dict[int, int] = {}

    def begin(self) -> None:
        """Open the init phase: everything before the first engine."""
        self.marks.mark(Phase.INIT)

    def end(self) -> None:
        """Watch no more: engines are as they were, and those that are built from now on are
        nobody's business."""
        self._is_over = True
        for undo in self._undo:
            undo()
        self._undo.clear()

    def building(self) -> None:
        """`deepspeed.initialize` has been called."""
        if self.engines and not self._is_over:
            self.marks.mark(Phase.INIT)

    def built(self, engine: Any, *, zero_init: bool = False) -> None:
        """`deepspeed.initialize` returns this engine."""
        if self._is_over:
            self.engines.append(engine)
            return
        self.add(engine)
        self._observer.built(engine, zero_init=zero_init)
        self.marks.mark(None)

    def add(self, engine: Any) -> None:
        """Watch an engine from now on."""
        self.engines.append(engine)
        forward = engine.register_forward_pre_hook(functools.partial(self._forward, engine), with_kwargs=True)
        called = engine.module.register_forward_pre_hook(functools.partial(self._without_engine, engine))
        self._undo += [forward.remove, called.remove]
        if not is_pipeline(engine):  # it refuses these, and runs instructions of its own (`hooks.py`)
            self._replace(engine, "backward", self._backward(engine.backward))
            self._replace(engine, "step", self._stepping(engine, engine.step))

    def instruction(self, phase: Phase, method: Callable[..., Any]) -> Callable[..., Any]:
        """A pipeline engine's instruction that marks its phase."""

        @functools.wraps(method)
        def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
            run = functools.partial(method, engine)
            if self._is_over:
                return run(*args, **kwargs)
            if phase is Phase.STEP:
                return self._step(engine, run, args, kwargs, is_update=True)
            return self._run(Phase.EVAL if phase is Phase.FORWARD and self._evaluates(engine) else phase, run, args, kwargs)

        return call

    def backward_begins(self, loss: Any) -> None:
        """`torch.autograd.backward` has been called by somebody: by a script that trains without
        `engine.backward`, if by no engine."""
        if self.engines and not self._inside and not self._is_over and not in_backward():
            self._observer.goes_backward(loss)
            if self.marks.phase in (Phase.FORWARD, Phase.EVAL, None):
                self.marks.mark(Phase.BACKWARD)

    def _forward(self, engine: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():  # checkpointing of everything runs it again
            return
        if self._evaluates(engine):
            self._evaluation()
            return
        self.marks.mark(Phase.FORWARD)
        self._observer.called(engine, args, kwargs)

    def _without_engine(self, engine: Any, *_: Any) -> None:
        """A model is called, perhaps without its engine: in an evaluation, to generate, or by a
        script that never calls the engine."""
        if self._inside or in_backward():
            return
        if self._evaluates(engine):
            self._evaluation()
        elif self.marks.phase in (None, Phase.BACKWARD, Phase.EVAL):
            self.marks.mark(Phase.FORWARD)

    def _evaluation(self) -> None:
        """An evaluation begins, or goes on with its next batch."""
        if self.marks.phase is not Phase.EVAL:
            self.marks.mark(Phase.EVAL)

    def _evaluates(self, engine: Any) -> bool:
        """Whether a forward pass of this engine that begins now belongs to an evaluation.

        One without an optimizer (a reference, a teacher) is in eval mode all the time: there the
        engines that train tell.
        """
        import torch

        if torch.is_grad_enabled():
            return False
        if trains(engine):
            return not engine.module.training
        trained = [each for each in self.engines if trains(each)]
        return self.marks.phase is not Phase.FORWARD and not any(each.module.training for each in trained)

    def _replace(self, engine: Any, name: str, method: Callable[..., Any]) -> None:
        """Put a method in the place of an engine's own, until `end`; where somebody has put another
        there by then, it stays."""
        before = vars(engine).get(name)

        def undo() -> None:
            if vars(engine).get(name) is not method:
                return
            delattr(engine, name)
            if before is not None:
                setattr(engine, name, before)

        setattr(engine, name, method)
        self._undo.append(undo)

    def _backward(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def backward(*args: Any, **kwargs: Any) -> Any:
            if self._is_over:
                return method(*args, **kwargs)
            self._observer.goes_backward(args[0] if args else kwargs.get("loss"))
            return self._run(Phase.BACKWARD, method, args, kwargs)

        return backward

    def _stepping(self, engine: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self._is_over:
                return method(*args, **kwargs)
            return self._step(engine, method, args, kwargs, is_update=engine.is_gradient_accumulation_boundary())

        return step

    def _run(self, phase: Phase, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run something of an engine's own, whose phase begins now."""
        if phase is Phase.EVAL:
            self._evaluation()
        else:
            self.marks.mark(phase)
        self._inside += 1
        try:
            return method(*args, **kwargs)
        finally:
            self._inside -= 1

    def _step(self, engine: Any, method: Callable[..., Any], args: Any, kwargs: Any, *, is_update: bool) -> Any:
        result = self._run(Phase.STEP, method, args, kwargs)
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


def trains(engine: Any) -> bool:
    """Whether it has an optimizer."""
    return getattr(engine, "basic_optimizer", None) is not None


def is_pipeline(engine: Any) -> bool:
    """Whether it is one of DeepSpeed's pipeline engines."""
    return any(base.__name__ == "PipelineEngine" for base in type(engine).__mro__)


def in_backward() -> bool:
    """Whether autograd is running in this thread."""
    import torch

    return torch._C._current_graph_task_id() != -1
