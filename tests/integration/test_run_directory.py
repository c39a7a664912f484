"""The folder that a measurement leaves: complete, readable by every command, and never overwritten
unasked."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from conftest import Measured
from harness import TEXT, bf16prof, finish, measure, measure_arguments, read_json, start, training

from bf16prof.measuring.results import load_rank
from bf16prof.runs import Status, load
from bf16prof.vocabulary import Source

pytestmark = pytest.mark.timeout(600)

CASE = "zero2-w2-bf16-fp32-master"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.xdist_group("learned")
def test_a_finished_run_is_complete(learned: Measured) -> None:
    assert learned.finished.code == 0, learned.finished.stderr
    run = load(learned.folder)

    assert run.manifest.status is Status.FINISHED
    assert [(case.case.label, case.status, case.message) for case in run.manifest.cases] == [(CASE, Status.FINISHED, "")]
    assert {record.source for record in run.records} == {Source.ESTIMATE, Source.MEASURE}
    assert run.manifest.versions["torch"]
    assert run.manifest.finished is not None
    assert run.manifest.created <= run.manifest.finished
    assert set(contents(learned.folder)) == {
        "run.json", "records.json", "loss.csv", "report.html", f"{CASE}/spec.json", f"{CASE}/launcher.log", f"{CASE}/exits.json",
        *(f"{CASE}/rank{rank}.{kind}" for rank in (0, 1) for kind in ("json", "log")),
    }  # fmt: skip


@pytest.mark.xdist_group("learned")
def test_json_is_all_of_stdout_and_names_the_run(learned: Measured) -> None:
    document = learned.finished.document

    assert document["run"] == str(learned.folder)
    assert document["schema_version"] == read_json(learned.folder / "records.json")["schema_version"]
    assert document["records"] == read_json(learned.folder / "records.json")["records"]
    assert [case["status"] for case in document["cases"]] == ["finished"]
    assert document["comparisons"]


@pytest.mark.xdist_group("learned")
def test_rank_files_hold_every_step_and_the_record_their_mean(learned: Measured) -> None:
    ranks = [load_rank(learned.folder / CASE, rank) for rank in (0, 1)]
    steps = learned.finished.record("measure", 2, "bf16-fp32-master")["steps"]

    losses = [[step.loss or 0.0 for step in rank.steps] for rank in ranks if rank is not None]

    assert len(steps) == 41
    assert [step["loss"] for step in steps] == [sum(pair) / 2 for pair in zip(*losses, strict=True)]
    assert losses[0] != losses[1], "ranks read different rows"
    assert {rank.status for rank in ranks if rank is not None} == {Status.FINISHED}


@pytest.mark.xdist_group("learned")
def test_a_model_learns_the_language_reference(learned: Measured) -> None:
    with (learned.folder / "loss.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    losses = [float(row["loss"]) for row in rows]

    assert [(row["case"], int(row["step"])) for row in rows] == [(CASE, step) for step in range(41)]
    assert 5.3 < losses[0] < 5.8, "ln(257) is 5.55: it knows nothing yet"
    assert sum(losses[-5:]) / 5 < losses[0] - 1


@pytest.mark.xdist_group("learned")
def test_the_same_seed_trains_alike(learned: Measured, tmp_path: Path) -> None:
    """Which --force replacing a run shows as well: the new run's losses begin as the old one's."""
    folder = tmp_path / "copy"
    shutil.copytree(learned.folder, folder)
    again = measure(folder, "--zero", "2", "--recipe", "bf16-fp32-master", "--force", sets=TEXT)
    first = learned.finished.record("measure", 2, "bf16-fp32-master")["steps"][:3]

    assert again.code == 0, again.stderr
    assert len(again.record("measure", 2, "bf16-fp32-master")["steps"]) == 3
    assert [s["loss"] for s in again.record("measure", 2, "bf16-fp32-master")["steps"]] == pytest.approx([s["loss"] for s in first])
    assert load(folder).manifest.status is Status.FINISHED


@pytest.mark.xdist_group("learned")
def test_an_existing_run_is_refused_and_untouched(learned: Measured) -> None:
    before = contents(learned.folder)
    refused = measure(learned.folder, "--zero", "1", "--recipe", "bf16-full")

    assert refused.code == 2
    assert refused.stdout == ""
    assert [line for line in refused.stderr.splitlines() if "--force" in line]
    assert contents(learned.folder) == before


@pytest.mark.parametrize("name", ["zero1-winter-photos/beach.jpg", f"{CASE}/notes.txt", "notes.txt"])
@pytest.mark.xdist_group("learned")
def test_force_removes_nothing_where_anything_of_the_users_lies(learned: Measured, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(learned.folder, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine", encoding="utf-8")
    before = contents(folder)
    refused = measure(folder, "--zero", "1", "--recipe", "bf16-full", "--force")

    assert refused.code == 2
    assert "nothing was removed" in refused.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("flags", [(), ("--force",)])
def test_of_two_that_start_at_once_one_gets_the_folder(tmp_path: Path, flags: tuple[str, ...]) -> None:
    both = [start(*measure_arguments(tmp_path / "run", "--zero", "1", "--recipe", "bf16-full", "--json", *flags)) for _ in range(2)]
    first, second = sorted((finish(process) for process in both), key=lambda done: done.code)

    assert (first.code, second.code) == (0, 2), second.stderr
    assert second.stdout == ""
    assert len([line for line in second.stderr.splitlines() if line.startswith("bf16prof: ")]) == 1
    assert load(tmp_path / "run").manifest.status is Status.FINISHED


@pytest.mark.parametrize("flags", [(), ("--force",)])
def test_a_folder_that_another_command_writes_is_refused_by_all(tmp_path: Path, flags: tuple[str, ...]) -> None:
    log = tmp_path / "losses.csv"
    log.write_text("step,loss\n0,1.0\n1,0.5\n", encoding="utf-8")
    with training(tmp_path / "run") as job:
        folder = str(job.folder)
        others = [
            measure(job.folder, "--zero", "1", "--recipe", "bf16-full", *flags),
            bf16prof("import", str(log), "-d", folder, "--zero", "1", "--gpus", "2", "--recipe", "bf16-full", *flags),
        ]
        page = bf16prof("report", folder)
        assert job.process.poll() is None
        assert load(job.folder).manifest.status is Status.RUNNING
        assert {p.name for p in job.folder.iterdir()} == {"run.json", "records.json", ".bf16prof.lock", ".bf16prof.reserve", job.case.name}

    for refused in (*others, page):
        assert refused.code == 2
        assert refused.stdout == ""
        assert "Traceback" not in refused.stderr
        assert "is being written by process" in refused.stderr


def test_force_never_empties_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    refused = measure(tmp_path, "--zero", "1", "--recipe", "bf16-full", "--force")

    assert refused.code == 2
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.xdist_group("learned")
def test_report_writes_a_runs_own_report_again_the_same(learned: Measured, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(learned.folder, folder)
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    done = bf16prof("report", str(folder))

    assert done.code == 0, done.stderr
    assert (folder / "report.html").read_bytes() == before
    assert CASE in done.stdout or "bf16-fp32-master" in done.stdout


@pytest.mark.xdist_group("learned")
def test_report_joins_two_runs(learned: Measured, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(learned.folder, second)
    both = tmp_path / "both.html"
    done = bf16prof("report", str(learned.folder), str(second), "-o", str(both), "--json")

    assert done.code == 0, done.stderr
    assert both.stat().st_size > 10_000
    assert len(done.document["records"]) == 4


def test_a_loss_that_is_not_finite_is_not_a_crash(tmp_path: Path) -> None:
    done = measure(tmp_path / "run", "--zero", "1", "--recipe", "bf16-full", "--set", "optimizer.lr=1e30")

    assert done.code == 0, done.stderr
    record = done.record("measure", 1, "bf16-full")
    assert [step["loss"] is None for step in record["steps"]] == [False, True, True]
    assert record["loss"] is None
    assert record["notes"] == ["the loss was not finite in 2 of 3 steps, first in step 2"]
