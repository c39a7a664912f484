"""Calibration: constants that made the times are found again, and what was not measured is not
predicted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from jobs import job, profile

from bf16prof import cli, runs
from bf16prof.closed_form.calibration import BETWEEN, calibrate, phase_rows
from bf16prof.closed_form.predict import predict
from bf16prof.commands.output import finished_run
from bf16prof.errors import InputError
from bf16prof.records import MemoryRecord
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import Device, Phase, Source

TRUTH = {
    "operations fp32": 2e-11,
    "operations bf16": 3e-11,
    "optimizer bytes": 1e-10,
    "sent bytes": 4e-10,
    BETWEEN: 2e-3,
    "collectives": 5e-5,
    "launches": 7e-3,
}
JITTER = (0.0, 0.0, 0.0, 0.04, 0.0, -0.02, 0.0, 0.01)
"""Held-back steps (every second one) vary, the fitted ones do not."""


def _record(stage: int, recipe: str, micro: int, world: int = 2) -> MemoryRecord:
    return predict(job(profile("cpu-demo", workload__micro_batch_size=micro), stage, world, recipe, device=Device.CPU))


def _measured(record: MemoryRecord, truth: dict[str, float] = TRUTH) -> MemoryRecord:
    assert record.work is not None
    phases = {name: sum(truth[term] * n for term, n in row.items()) for name, row in phase_rows(record.work).items()}
    steps = tuple(
        StepRecord(
            index, 1.0, sum(phases.values()) * (1 + jitter), None,
            phase_time_s={p: phases[p] * (1 + jitter) for p in (Phase.FORWARD, Phase.BACKWARD, Phase.STEP)},
        )
        for index, jitter in enumerate(JITTER)
    )  # fmt: skip
    return dataclasses.replace(record, source=Source.MEASURE, steps=steps, step_time_s=sum(phases.values()))


def _cases(*recipes: str) -> list[MemoryRecord]:
    return [_record(*case) for case in itertools.product((0, 2, 3), recipes, (1, 4))]


def test_constants_are_found_again() -> None:
    fit = calibrate("run", [_measured(r) for r in _cases("fp32", "bf16-fp32-master")])

    assert fit.seconds_per == pytest.approx(TRUTH, rel=1e-3)
    assert fit.error_share == pytest.approx(0.04, abs=1e-4)


def test_host_overhead_is_what_launching_costs() -> None:
    """Three launches (one forward, two backward) of every micro-step, and what is between the
    phases."""
    fit = calibrate("run", [_measured(r) for r in _cases("fp32", "bf16-fp32-master")])
    work = _record(2, "fp32", 1).work
    assert work is not None

    assert fit.host_overhead(work) == pytest.approx(2e-3 + 3 * 7e-3, rel=1e-3)
    assert fit.host_overhead(dataclasses.replace(work, micro_steps=4)) == pytest.approx(2e-3 + 12 * 7e-3, rel=1e-3)
    assert dataclasses.replace(fit, seconds_per={"sent bytes": 1e-9}).host_overhead(work) is None
    assert fit.calibrated(_record(2, "fp32", 1)).host_overhead_s == fit.host_overhead(work)
    unseen = _record(1, "bf16-full", 8)
    assert fit.predict(unseen.work) == pytest.approx(_measured(unseen).step_time_s, rel=1e-3)  # type: ignore[arg-type]


def test_calibrated_record_says_how_it_came_to_be() -> None:
    fit = calibrate("runs/one", [_measured(r) for r in _cases("bf16-fp32-master")])

    record = fit.calibrated(_record(1, "bf16-fp32-master", 4))

    assert record.step_time_s is not None
    assert record.step_time_error_s == pytest.approx(0.04 * record.step_time_s, rel=0.01)
    assert record.tokens_per_s == pytest.approx(2 * 4 * 128 / record.step_time_s)
    assert "6 measured cases of runs/one" in record.notes[-1]
    assert "extrapolating" in record.notes[-1]


def test_one_case_gives_rates_and_leaves_latency_inside_them() -> None:
    fit = calibrate("run", [_measured(_record(2, "bf16-fp32-master", 4))])

    assert set(fit.seconds_per) <= {"operations bf16", "optimizer bytes", "sent bytes", BETWEEN, "collectives", "launches"}
    assert len(fit.seconds_per) <= 4, "four phases tell four constants at most"
    assert fit.seconds_per["operations bf16"] >= TRUTH["operations bf16"]


def test_dtype_that_was_not_measured_is_not_predicted() -> None:
    fit = calibrate("run", [_measured(_record(2, "bf16-fp32-master", 4))])

    record = fit.calibrated(_record(2, "fp32", 4))

    assert record.step_time_s is None
    assert record.step_time_error_s is None
    assert record.notes[-1] == "step time: nothing measured in run tells it"


def test_more_cpu_ranks_share_the_same_cores() -> None:
    fit = calibrate("run", [_measured(_record(2, "bf16-fp32-master", 4))])

    assert fit.calibrated(_record(2, "bf16-fp32-master", 4, world=4)).step_time_s is None


def test_run_without_times_of_phases_is_refused() -> None:
    measured = _measured(_record(2, "fp32", 1))
    old = dataclasses.replace(measured, steps=tuple(dataclasses.replace(s, phase_time_s={}) for s in measured.steps))

    with pytest.raises(InputError, match=re.escape("--calibrate run: no measured case")):
        calibrate("run", [old, _record(2, "fp32", 1)])


def test_estimate_reads_the_run_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    records = tuple(_measured(r) for r in _cases("bf16-fp32-master"))
    runs.save(dataclasses.replace(finished_run("measured", records, {}, {}), path=tmp_path))
    selection = ["--profile", "cpu-demo", "--device", "cpu", "--zero", "1", "--gpus", "2", "--recipe", "fp32,bf16-fp32-master"]
    monkeypatch.setattr(sys, "argv", ["bf16prof", "estimate", *selection, "--calibrate", str(tmp_path), "--json"])

    with pytest.raises(SystemExit) as stop:
        cli.main()

    assert stop.value.code == 0
    fp32, bf16 = json.loads(capsys.readouterr().out)["records"]
    assert fp32["step_time_s"] is None
    assert bf16["step_time_s"] == pytest.approx(_measured(_record(1, "bf16-fp32-master", 4)).step_time_s, rel=0.01)
    assert bf16["step_time_error_s"] > 0
    assert bf16["step_time_floor_s"] is None
    assert str(tmp_path) in bf16["notes"][-1]


def test_plan_takes_no_calibration_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.save(dataclasses.replace(finished_run("measured", (_measured(_record(2, "bf16-full", 1)),), {}, {}), path=tmp_path))
    monkeypatch.setattr(
        sys, "argv", ["bf16prof", "plan", "--no-verify", "--profile", "cpu-demo", "--gpu", "l4-24gb", "--calibrate", str(tmp_path)]
    )

    with pytest.raises(SystemExit) as stop:
        cli.main()

    assert stop.value.code == 2
    assert "measured on CPU ranks, which tells nothing of l4-24gb" in capsys.readouterr().err
