"""A measurement whose disk fills up: what was measured is kept, the run is marked failed, and the
exit code is 3."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from bf16prof.cases import Selection, expand
from bf16prof.closed_form.predict import predictions
from bf16prof.errors import RunFailed
from bf16prof.measuring import session
from bf16prof.measuring.launcher import RanksOutcome
from bf16prof.measuring.results import RankResult
from bf16prof.profiles.load import load_profile
from bf16prof.runs import RESERVE, Status, load
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Device

RANK = RankResult(0, 1, Status.FINISHED, Device.CPU, "cpu", parameters=123, init=PhaseMemory(40, 30), allocated_bytes=95)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> session.MeasurementPlan:
    """Three cases whose ranks finish at once."""
    profile = load_profile("cpu-demo").profile
    jobs = expand(Selection(profile, [1, 2, 3], [2], ["bf16-full"], Device.CPU))
    monkeypatch.setattr(session, "prepare", lambda *_: None)
    ranks = (RANK, dataclasses.replace(RANK, rank=1))
    monkeypatch.setattr(session, "launch", lambda *_: RanksOutcome(Status.FINISHED, "", "", ranks))
    return session.MeasurementPlan("cpu-demo", jobs, tuple(predictions(jobs)), tmp_path, 1, 1, 10.0)


class Full(session.Watcher):
    """Fills the disk when the second case begins; there is room again as soon as the reserve is
    given back."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, for_good: bool = False) -> None:
        self._reserve, self._patch, self._for_good = folder / RESERVE, monkeypatch, for_good

    def case_begins(self, index: int, job: object) -> None:
        if index == 1:
            assert self._reserve.stat().st_size == 2**20
            self._patch.setattr(os, "fsync", self._fail)

    def _fail(self, _descriptor: int) -> None:
        if self._for_good or self._reserve.exists():
            raise OSError(28, "No space left on device")


def test_a_full_disk_in_the_middle_keeps_what_was_measured(plan: session.MeasurementPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        session.measure(plan, Full(plan.folder, monkeypatch))
    run = load(plan.folder)

    assert caught.value.exit_code == 3
    assert run.manifest.status is Status.FAILED
    assert [case.status for case in run.manifest.cases] == [Status.FINISHED, Status.FAILED, Status.INTERRUPTED]
    assert "No space left on device" in run.manifest.cases[1].message
    assert [record.case.zero_stage for record in run.records if record.source == "measure"] == [1]
    assert not (plan.folder / RESERVE).exists()


def test_a_disk_that_stays_full_still_ends_in_one_line(plan: session.MeasurementPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match="No space left on device"):
        session.measure(plan, Full(plan.folder, monkeypatch, for_good=True))
    monkeypatch.undo()

    assert load(plan.folder).manifest.status is Status.INTERRUPTED, "nothing could be written, and nobody runs it"


def test_what_somebody_puts_in_the_place_of_a_case_stays(plan: session.MeasurementPlan) -> None:
    mine = plan.folder / plan.jobs[1].case.label
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    with pytest.raises(RunFailed, match="File exists"):
        session.measure(plan, session.Watcher())

    assert [path.name for path in mine.iterdir()] == ["mine.txt"]
    assert load(plan.folder).manifest.status is Status.FAILED


def test_a_run_that_ends_well_leaves_no_reserve(plan: session.MeasurementPlan) -> None:
    run = session.measure(plan, session.Watcher())

    assert run.manifest.status is Status.FINISHED
    assert {path.name for path in plan.folder.iterdir() if path.is_file()} == {"run.json", "records.json", "loss.csv"}
