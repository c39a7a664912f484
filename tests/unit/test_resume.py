"""A series that was interrupted goes on: what is finished stays, what is not is measured, and
nothing is mixed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bf16prof.cases import Selection, expand
from bf16prof.claims import claimed
from bf16prof.closed_form.predict import predictions
from bf16prof.errors import InputError
from bf16prof.measuring import resume, session
from bf16prof.measuring.launcher import RanksOutcome
from bf16prof.measuring.machine import versions
from bf16prof.measuring.places import Place
from bf16prof.measuring.results import RankResult
from bf16prof.measuring.resume import NOTHING, finished
from bf16prof.profiles.load import load_profile
from bf16prof.runs import Run, Status, load
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Device, Source


def result(rank: int) -> RankResult:
    return RankResult(rank, 1, Status.FINISHED, Device.CPU, "cpu", parameters=123, init=PhaseMemory(40, 30), allocated_bytes=95)


class Ranks:
    """Ranks that finish at once, but for those of one number of ranks; it remembers what was
    launched."""

    def __init__(self, failing: int = 0) -> None:
        self.failing, self.launched = failing, []  # type: tuple[int, list[str]]

    def launch(self, folder: Path, _place: Place, world_size: int, *_: object) -> RanksOutcome:
        self.launched.append(folder.name)
        if world_size == self.failing:
            return RanksOutcome(Status.FAILED, "rank 0: no", "", (None,) * world_size)
        return RanksOutcome(Status.FINISHED, "", "", tuple(result(rank) for rank in range(world_size)))


def plan(folder: Path, sizes: tuple[int, ...] = (1, 2, 4), steps: int = 1) -> session.MeasurementPlan:
    jobs = expand(Selection(load_profile("cpu-demo").profile, [1], sizes, ["bf16-full"], Device.CPU))
    return session.MeasurementPlan("cpu-demo", jobs, tuple(predictions(jobs)), folder, 1, steps, 10.0)


def measured(which: session.MeasurementPlan, ranks: Ranks, patch: pytest.MonkeyPatch, *, again: bool = False) -> Run:
    """What `measure`, or `measure --resume`, does with such ranks."""
    patch.setattr(session, "prepare", lambda *_: None)
    patch.setattr(session, "launch", ranks.launch)
    with claimed(which.folder, "x", force=again) as claim:
        kept = finished(which.folder, [which.task(job) for job in which.jobs]) if again else NOTHING
        claim.clear(keep=kept.cases)
        return session.measure(dataclasses.replace(which, kept=kept), session.Watcher())


def statuses(run: Run) -> list[Status]:
    return [case.status for case in run.manifest.cases]


def test_a_failed_case_does_not_end_a_series_and_is_all_that_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series, first, second = plan(tmp_path / "run"), Ranks(failing=2), Ranks()
    broken = measured(series, first, monkeypatch)
    whole = measured(series, second, monkeypatch, again=True)

    assert statuses(broken) == [Status.FINISHED, Status.FAILED, Status.FINISHED]
    assert first.launched == [job.case.label for job in series.jobs]
    assert second.launched == [series.jobs[1].case.label]
    assert statuses(whole) == [Status.FINISHED] * 3
    assert whole.manifest.status is Status.FINISHED
    records = [record for record in load(tmp_path / "run").records if record.source is Source.MEASURE]
    assert sorted(record.case.world_size for record in records) == [1, 2, 4]


def test_a_series_may_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = Ranks()
    measured(plan(tmp_path / "run", (1, 2)), Ranks(), monkeypatch)
    run = measured(plan(tmp_path / "run", (1, 2, 8)), more, monkeypatch, again=True)

    assert [name for name in more.launched if "w8" not in name] == []
    assert statuses(run) == [Status.FINISHED] * 3


def test_where_nothing_was_measured_a_series_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    measured(plan(tmp_path / "run"), ranks, monkeypatch, again=True)

    assert len(ranks.launched) == 3


def test_what_is_not_the_same_series_is_refused_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(plan(tmp_path / "run"), Ranks(), monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    now = versions()

    with pytest.raises(InputError, match="which is not asked for now"):
        measured(plan(tmp_path / "run", (1, 2)), Ranks(), monkeypatch, again=True)
    with pytest.raises(InputError, match="was measured with other settings"):
        measured(plan(tmp_path / "run", steps=2), Ranks(), monkeypatch, again=True)
    monkeypatch.setattr(resume, "versions", lambda: {**now, "torch": "9.9"})
    with pytest.raises(InputError, match=r"was measured with torch .* and now it is 9\.9"):
        measured(plan(tmp_path / "run"), Ranks(), monkeypatch, again=True)
    assert sorted(tmp_path.rglob("*")) == before
