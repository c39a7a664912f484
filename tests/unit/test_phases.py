"""Phase marks over a meter whose readings are written down beforehand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bf16prof.engine.phases import PhaseClock, PhaseMarks, attach
from bf16prof.engine.pipeline import PHASES
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Phase


class Meter:
    """A memory that goes where it is told; its phase peak is the highest since it was last
    taken."""

    def __init__(self, now: int = 0) -> None:
        self.now = self.peak = now
        self.taken: list[int] = []

    def goes(self, *levels: int) -> None:
        for self.now in levels:
            self.peak = max(self.peak, self.now)

    def allocated_bytes(self) -> int:
        return self.now

    def take_phase_peak(self) -> int:
        peak, self.peak = self.peak, self.now
        self.taken.append(peak)
        return peak


def test_a_mark_closes_one_phase_and_opens_the_next() -> None:
    meter = Meter(10)
    marks = PhaseMarks(meter)
    marks.mark(Phase.FORWARD)
    meter.goes(50, 40)
    marks.mark(Phase.BACKWARD)
    meter.goes(30, 45, 20)
    marks.mark(None)

    assert marks.take() == {Phase.FORWARD: PhaseMemory(50, 40), Phase.BACKWARD: PhaseMemory(45, 20)}


def test_what_happens_while_no_phase_is_open_belongs_to_none() -> None:
    meter = Meter(10)
    marks = PhaseMarks(meter)
    meter.goes(1000, 10)
    marks.mark(Phase.STEP)
    meter.goes(20)
    marks.mark(None)
    meter.goes(2000, 5)
    marks.mark(Phase.FORWARD)
    marks.mark(None)

    assert marks.take() == {Phase.FORWARD: PhaseMemory(5, 5), Phase.STEP: PhaseMemory(20, 20)}


def test_micro_steps_keep_the_highest_peak_and_the_last_end() -> None:
    meter = Meter()
    marks = PhaseMarks(meter)
    for forward, backward in (((7, 3), (9, 1)), ((5, 4), (11, 2)), ((6, 2), (8, 6))):
        marks.mark(Phase.FORWARD)
        meter.goes(*forward)
        marks.mark(Phase.BACKWARD)
        meter.goes(*backward)
        marks.mark(None)

    assert marks.take() == {Phase.FORWARD: PhaseMemory(7, 2), Phase.BACKWARD: PhaseMemory(11, 6)}


def test_nothing_is_lost_between_open_phases() -> None:
    """Whenever the memory moves, the move is seen by exactly one phase: the peaks cover the highest
    of all levels."""
    meter = Meter(3)
    marks = PhaseMarks(meter)
    levels = [4, 90, 2, 17, 60, 1, 33, 20]
    for index, level in enumerate(levels):
        marks.mark((Phase.FORWARD, Phase.BACKWARD, Phase.STEP)[index % 3])
        meter.goes(level)
    marks.mark(None)
    phases = marks.take()

    assert max(memory.peak_bytes or 0 for memory in phases.values()) == max(levels)
    assert phases[Phase.BACKWARD].end_bytes == levels[-1]
    assert len(meter.taken) == len(levels) + 1


def test_taking_starts_again_and_gives_phases_in_their_order() -> None:
    meter = Meter()
    marks = PhaseMarks(meter)
    for phase in (Phase.STEP, Phase.BACKWARD, Phase.INIT, Phase.FORWARD):
        marks.mark(phase)
    marks.mark(None)

    assert list(marks.take()) == [Phase.INIT, Phase.FORWARD, Phase.BACKWARD, Phase.STEP]
    assert marks.take() == {}


def test_an_open_phase_is_not_taken_before_it_ends() -> None:
    meter = Meter()
    marks = PhaseMarks(meter)
    marks.mark(Phase.FORWARD)
    meter.goes(8, 4)

    assert marks.take() == {}
    marks.mark(None)
    assert marks.take() == {Phase.FORWARD: PhaseMemory(8, 4)}


class Engine:
    """The four methods of a DeepSpeed engine that marks are attached to."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.module = meter, SimpleNamespace(training=True)
        self.hooks: list[Callable[..., Any]] = []

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> None:
        self.hooks.append(hook)

    def forward(self, batch: int) -> int:
        for hook in self.hooks:
            assert hook(self, (batch,)) is None, "a pre-hook that returns something replaces the inputs"
        self.meter.goes(100, 80)
        return batch + 1

    def backward(self, loss: int, *, scale: int = 1) -> int:
        self.meter.goes(120, 30)
        return loss * scale

    def step(self) -> str:
        self.meter.goes(60, 10)
        return "stepped"


def test_an_engine_sets_the_marks_itself_and_behaves_as_before() -> None:
    meter = Meter(10)
    marks = PhaseMarks(meter)
    engine = Engine(meter)
    attach(engine, marks)

    assert engine.forward(4) == 5
    meter.goes(90, 85)  # the loss function, after forward returned
    assert engine.backward(3, scale=2) == 6
    assert engine.step() == "stepped"
    meter.goes(500, 10)  # nobody's
    assert marks.take() == {
        Phase.FORWARD: PhaseMemory(100, 85), Phase.BACKWARD: PhaseMemory(120, 30), Phase.STEP: PhaseMemory(60, 10),
    }  # fmt: skip


def test_a_failing_step_leaves_its_phase_open() -> None:
    class Failing(Engine):
        def step(self) -> str:
            raise RuntimeError("no")

    marks = PhaseMarks(Meter())
    engine = Failing(Meter())
    attach(engine, marks)
    with pytest.raises(RuntimeError, match="no"):
        engine.step()

    assert marks.take() == {}


def test_a_clock_adds_up_the_phases_of_all_micro_steps_and_nothing_between_them() -> None:
    moments = iter([0.0, 3.0, 10.0, 11.0, 20.0, 24.0, 24.0])
    clock = PhaseClock(lambda: next(moments))

    for phase in (Phase.FORWARD, Phase.BACKWARD, None, Phase.FORWARD, Phase.BACKWARD, Phase.STEP, None):
        clock.mark(phase)

    assert clock.take() == {Phase.FORWARD: 12.0, Phase.BACKWARD: 11.0, Phase.STEP: 0.0}
    assert clock.take() == {}


def test_a_pipelines_instructions_are_its_phases() -> None:
    """Its engine runs a schedule, and calls neither forward nor backward nor step."""
    meter, carried_out = Meter(1), list[str]()

    class PipelineEngine:
        _INSTRUCTION_MAP = {type(name, (), {}): lambda self, name=name: carried_out.append(name) for name in PHASES}  # noqa: RUF012

    engine: Any = PipelineEngine()
    marks = PhaseMarks(meter)
    attach(engine, marks)
    seen = []
    for kind in ("LoadMicroBatch", "ForwardPass", "SendActivation", "RecvGrad", "BackwardPass", "ReduceGrads", "OptimizerStep"):
        next(method for cls, method in engine._INSTRUCTION_MAP.items() if cls.__name__ == kind)(engine)
        seen.append(marks.phase)

    assert seen == [*[Phase.FORWARD] * 3, *[Phase.BACKWARD] * 3, None]
    assert carried_out[-1] == "OptimizerStep"
    assert list(marks.take()) == [Phase.FORWARD, Phase.BACKWARD, Phase.STEP]
    assert len(meter.taken) == 4, "one mark for each change of the phase"


def test_a_forward_pass_in_eval_mode_is_one_of_an_evaluation() -> None:
    engine = Engine(Meter(10))
    marks = PhaseMarks(engine.meter)
    attach(engine, marks)
    engine.module.training = False
    engine.forward(1)
    marks.mark(None)

    assert list(marks.take()) == [Phase.EVAL]
