"""Runs in experiment trackers: read back with TensorBoard's own reader, and handed to Weights &
Biases as its library takes them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import report_fixtures as fixtures
from command_line import Main, main

from bf16prof.reports import trackers
from bf16prof.step_records import StepRecord

__all__ = ["main"]  # a fixture


def test_tensorboard_reads_every_value_of_a_record(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fixtures.run()
    folders = trackers.to_tensorboard([run], tmp_path / "events")

    assert len(folders) == len(set(folders)) == len(run.records)
    record = next(each for each in run.records if each.steps)
    (folder,) = [each for each in folders if each.name == f"{record.case.label}-{record.source}"]
    found = EventAccumulator(str(folder)).Reload()
    assert found.Scalars("memory/allocated_bytes")[0].value == pytest.approx(record.allocated_bytes)
    assert [each.step for each in found.Scalars("step/loss")] == [step.step for step in record.steps if step.loss is not None]


def test_weights_and_biases_gets_the_case_the_steps_and_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []

    class Logged:
        summary = SimpleNamespace(update=lambda found: told.append(("summary", found)))

        def __enter__(self) -> Logged:
            return self

        def __exit__(self, *error: object) -> None:
            told.append(("end", None))

        def log(self, found: dict[str, float], step: int) -> None:
            told.append((f"step {step}", found))

    def init(**given: Any) -> Logged:
        told.append(("init", given))
        return Logged()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    run = fixtures.run()
    names = trackers.to_wandb([run], "mine")

    starts = [given for what, given in told if what == "init"]
    assert [each["name"] for each in starts] == names
    assert {each["project"] for each in starts} == {"mine"}
    assert starts[0]["config"]["recipe"] == run.records[0].case.recipe
    assert sum(what == "end" for what, _ in told) == len(names)
    steps = [found for what, found in told if what.startswith("step ")]
    assert {"step/loss", "step/time_s"} <= set(steps[0])


def test_what_a_step_does_not_know_is_left_out() -> None:
    assert trackers.curves(StepRecord(3, None, None, 7)) == {"step/allocated_bytes": 7}


def test_a_tracker_that_is_not_installed_is_one_line(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    code, _, said = main("report", "published:deepspeed-bf16-example", "--wandb", "mine", "--json")

    assert code == 2
    assert "--wandb needs wandb" in said
    assert "pip install 'bf16prof[wandb]'" in said
