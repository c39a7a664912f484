"""Engines of a script are watched: phases are marked and steps are counted, whatever the script
calls."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bf16prof.engine.phases import PhaseMarks
from bf16prof.scripts.holders import held_by_frames
from bf16prof.scripts.hooks import hooked
from bf16prof.scripts.main import SeenEnough
from bf16prof.scripts.watch import Watch
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Phase


class Meter:
    """A memory that nothing is in."""

    def allocated_bytes(self) -> int:
        return 0

    def take_phase_peak(self) -> int:
        return 0


class Engine(nn.Module):
    """What DeepSpeed's engine is to those that watch it."""

    def __init__(self, accumulation: int = 1, *, has_optimizer: bool = True) -> None:
        super().__init__()
        self.basic_optimizer = "some" if has_optimizer else None
        self.module = nn.Linear(2, 1)
        self._accumulation, self._calls = accumulation, 0

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.module(x).sum()
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self._calls + 1) % self._accumulation == 0

    def step(self) -> None:
        self._calls += 1


class Notes:
    """An observer that writes down what it is told."""

    def __init__(self, last: int = 100) -> None:
        self.told: list[str] = []
        self.kept: list[str] = []
        self._last = last

    def built(self, engine: Any, *, zero_init: bool) -> None:
        self.told.append("built")

    def called(self, engine: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        self.told.append("called")

    def goes_backward(self, loss: Any) -> None:
        self.told.append("loss")

    def stepped(self, engine: Any, frame: FrameType) -> None:
        self.told.append("stepped")
        self.kept = list(held_by_frames(frame))
        if self.told.count("stepped") >= self._last:
            raise SeenEnough


def _watched(notes: Notes, *engines: Engine) -> tuple[Watch, list[Phase | None]]:
    marked: list[Phase | None] = []
    watch = Watch(PhaseMarks(Meter(), on_mark=marked.append), notes)
    for engine in engines:
        watch.add(engine)
    return watch, marked


@pytest.mark.parametrize("plain", [False, True])
def test_phases_are_marked_whoever_calls_backward(plain: bool) -> None:
    engine = Engine()
    watch, marked = _watched(Notes(), engine)
    with hooked(watch):
        loss = engine(torch.ones(3, 2))
        loss.backward() if plain else engine.backward(loss)
        engine.step()
    assert marked == [Phase.FORWARD, Phase.BACKWARD, Phase.STEP, None]
    assert watch.steps == 1


def test_only_an_update_ends_a_step() -> None:
    engine, notes = Engine(accumulation=3), Notes()
    watch, _ = _watched(notes, engine)
    for _ in range(6):
        engine.backward(engine(torch.ones(1, 2)))
        engine.step()
    assert watch.steps == 2
    assert notes.told.count("called") == 6


def test_engines_that_are_trained_in_turn_make_one_step() -> None:
    first, second = Engine(), Engine()
    watch, _ = _watched(Notes(), first, second)
    steps = []
    for _ in range(4):
        for engine in (first, second):
            engine.step()
        steps.append(watch.steps)
    assert steps[1:] == [2, 3, 4], "the first step does not know of the second engine yet"


def test_an_engine_that_is_trained_no_more_is_not_waited_for() -> None:
    first, second = Engine(), Engine()
    watch, _ = _watched(Notes(), first, second)
    first.step()
    for _ in range(20):
        second.step()
    assert watch.steps > 2


def test_an_observer_ends_the_script_and_learns_its_names() -> None:
    engine, notes = Engine(), Notes(last=2)
    _watched(notes, engine)

    def train() -> None:
        while True:
            batch = {"x": torch.ones(3, 2)}
            outputs = engine(batch["x"])
            engine.step()
            assert outputs.requires_grad

    with pytest.raises(SeenEnough):
        train()
    line = train.__code__.co_firstlineno
    assert notes.kept[:2] == [f"batch (test_scripts_watch.py:{line + 2})", f"outputs (test_scripts_watch.py:{line + 3})"]


def test_looking_at_variables_keeps_nothing_alive() -> None:
    def train() -> int:
        kept = torch.ones(3)
        held_by_frames(sys._getframe())
        before = sys.getrefcount(kept)
        held_by_frames(sys._getframe())
        return sys.getrefcount(kept) - before

    assert train() == 0


class Filling(Meter):
    """A memory whose peak is as told."""

    peak = 0

    def take_phase_peak(self) -> int:
        return self.peak


def _train(engine: Engine) -> None:
    engine.backward(engine(torch.ones(1, 2)))
    engine.step()


def test_an_evaluation_between_steps_is_no_step_and_no_forward_pass() -> None:
    engine, notes = Engine(), Notes()
    watch, marked = _watched(notes, engine)
    for context in (torch.no_grad, torch.inference_mode):
        _train(engine)
        engine.module.eval()
        with context():
            engine(torch.ones(8, 2))
            engine.module(torch.ones(8, 2))
            engine(torch.ones(8, 2))
        engine.module.train()
    _train(engine)
    step = [Phase.FORWARD, Phase.BACKWARD, Phase.STEP, None]
    assert marked == [*step, Phase.EVAL, *step, Phase.EVAL, *step], "one mark, however many batches it has"
    assert watch.steps == 3
    assert notes.told.count("called") == 3, "its batches say nothing of the job's"


def test_an_evaluation_between_micro_steps_leaves_them_alone() -> None:
    engine, notes = Engine(accumulation=2), Notes()
    watch, marked = _watched(notes, engine)
    for _ in range(2):
        _train(engine)
        engine.module.eval()
        with torch.no_grad():
            engine(torch.ones(8, 2))
        engine.module.train()
    assert watch.steps == notes.told.count("stepped") == 1
    assert marked.count(Phase.FORWARD) == marked.count(Phase.EVAL) == 2


@pytest.mark.parametrize(("training", "grad"), [(True, False), (False, True)], ids=["no gradients", "eval mode"])
def test_either_alone_is_a_forward_pass(training: bool, grad: bool) -> None:
    engine = Engine()
    _, marked = _watched(Notes(), engine)
    engine.module.train(training)
    with torch.set_grad_enabled(grad):
        engine(torch.ones(1, 2))
    assert marked == [Phase.FORWARD]


def test_a_model_that_is_called_without_its_engine_evaluates_if_it_says_so() -> None:
    engine = Engine()
    watch, marked = _watched(Notes(), engine)
    _train(engine)
    engine.module(torch.ones(1, 2))
    assert marked[-2:] == [None, Phase.FORWARD]
    _train(engine)
    engine.module.eval()
    with torch.no_grad():
        engine.module(torch.ones(1, 2))
    assert marked[-2:] == [None, Phase.EVAL]
    assert watch.steps == 2


def test_a_script_that_never_calls_its_engine_has_forward_passes() -> None:
    """DeepSpeedExamples' GAN: two losses of one model, each with a backward pass of its own."""
    engine = Engine()
    _, marked = _watched(Notes(), engine)
    for _ in range(2):
        engine.backward(engine.module(torch.ones(1, 2)).sum())
    engine.step()
    assert marked == [Phase.FORWARD, Phase.BACKWARD, Phase.FORWARD, Phase.BACKWARD, Phase.STEP, None]


def test_a_reference_belongs_to_whatever_the_trained_engine_does() -> None:
    engine, reference = Engine(), Engine(has_optimizer=False)
    _, marked = _watched(Notes(), engine, reference)
    reference.module.eval()
    for training in (True, False):
        engine.module.train(training)
        with torch.set_grad_enabled(training):
            loss = engine(torch.ones(1, 2))
        with torch.no_grad():
            reference(torch.ones(1, 2))
        if training:
            engine.backward(loss)
            engine.step()
    assert marked == [Phase.FORWARD, Phase.FORWARD, Phase.BACKWARD, Phase.STEP, None, Phase.EVAL]


def test_engines_are_as_they_were_when_nobody_watches_any_more() -> None:
    engine, notes = Engine(), Notes()
    before = dict(vars(engine))
    watch, _ = _watched(notes, engine)
    _train(engine)
    watch.end()
    told = list(notes.told)
    with hooked(watch):
        _train(engine)
    assert notes.told == told
    assert vars(engine).keys() == before.keys()
    assert not engine._forward_pre_hooks
    assert not engine.module._forward_pre_hooks


def test_what_a_script_has_put_in_the_place_of_our_methods_stays() -> None:
    engine, notes = Engine(), Notes()
    watch, _ = _watched(notes, engine)
    ours = engine.step
    calls: list[None] = []

    def step() -> None:
        calls.append(None)
        ours()

    engine.step = step  # type: ignore[method-assign]
    watch.end()
    engine.step()
    assert (len(calls), engine._calls, watch.steps) == (1, 1, 0)


def test_what_a_script_holds_between_steps_is_kept_apart() -> None:
    meter = Filling()
    marks = PhaseMarks(meter)
    for phase, peak in ((Phase.INIT, 0), (None, 90), (Phase.FORWARD, 80), (Phase.STEP, 50), (None, 60), (Phase.FORWARD, 70)):
        meter.peak = peak
        marks.mark(phase)
    assert marks.between == 70  # of the time before the last forward pass; not of that before the first
    assert marks.take() == {Phase.INIT: PhaseMemory(90, 0), Phase.FORWARD: PhaseMemory(50, 0), Phase.STEP: PhaseMemory(60, 0)}


class Lazy(dict[str, Any]):
    """A mapping that loads when it is asked, as transformers' of all models."""

    def values(self) -> Any:
        raise ImportError("everything at once")


class Proxy:
    """Stands for an object that is not there."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("outside of its context")


def test_objects_are_looked_into_without_their_noticing() -> None:
    lazy, proxy, batch = Lazy(a=1), Proxy(), {"tokens": torch.ones(2)}
    held = held_by_frames(sys._getframe())
    assert [name.split()[0] for name in held if "test_scripts_watch" in name] == ["batch"], (lazy, proxy, batch)
