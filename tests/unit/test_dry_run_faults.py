"""Dry runs that are killed: the others' results are kept, and what happened is said."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import report_fixtures as fixtures
from command_line import Main, main
from jobs import job, small_profile

from bf16prof.documents import document
from bf16prof.dry_run import runner
from bf16prof.dry_run.runner import DryRunFailed, Files
from bf16prof.dry_run.task import Fault
from bf16prof.errors import InputError
from bf16prof.files import write_json
from bf16prof.processes import child_environment
from bf16prof.runs import read

__all__ = ["main"]

JOB = job(small_profile())

WORKER = """
import os, signal, sys, types
sys.modules["bf16prof.dry_run.dryrun"] = sys.modules["torch._dynamo"] = types.ModuleType("nothing")
from bf16prof.dry_run import worker

def run_task(files):
    if files.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    files.record.write_text("{}")
    os._exit(0)

worker.run_task = run_task
worker.main()
"""


@pytest.mark.timeout(60)
def test_a_killed_dry_run_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WORKER, str(tmp_path), "4"], env=child_environment(), check=True, timeout=50)
    tasks = [Files(tmp_path, index) for index in range(4)]

    assert [files.record.exists() for files in tasks] == [True, False, True, True]
    assert read(tasks[1].fault, Fault).message.startswith("killed by SIGKILL")


def ended(folder: Path, *outcomes: str) -> list[runner._Run]:
    """Tasks that left a record, a fault of that text, or nothing."""
    tasks = [runner._Run(Files(folder, index), index, JOB, 0) for index in range(len(outcomes))]
    for files, outcome in zip((run.files for run in tasks), outcomes, strict=True):
        if outcome == "record":
            write_json(files.record, document([dataclasses.replace(fixtures.bare_record(), reserved_bytes=files.index)]))
        elif outcome:
            write_json(files.fault, Fault(outcome, "", is_input=outcome.startswith("bad input")))
    return tasks


def test_the_records_of_the_others_come_with_the_failure(tmp_path: Path) -> None:
    tasks = ended(tmp_path, "record", "killed by SIGKILL", "record", "")
    with pytest.raises(DryRunFailed, match=r"failed \(and 1 more\): killed by SIGKILL") as caught:
        runner._found(tasks, runner._Ending(0, False, tmp_path / "log"))

    assert {index: record.reserved_bytes for index, record in caught.value.records.items()} == {0: 0, 2: 2}
    assert caught.value.exit_code == 3


def test_bad_input_comes_before_what_broke(tmp_path: Path) -> None:
    tasks = ended(tmp_path, "broke", "bad input: no such model")
    with pytest.raises(InputError, match="bad input"):
        runner._found(tasks, runner._Ending(0, False, tmp_path / "log"))


@pytest.mark.parametrize(
    ("code", "by_kernel", "expected"),
    [
        (-9, True, "killed by the kernel, for there was no memory left"),
        (-9, False, "killed by SIGKILL"),
        (-11, True, "killed by SIGSEGV"),
        (7, False, "exit code 7, and no output"),
    ],
)
def test_a_process_that_left_nothing_is_told_by_its_end(code: int, by_kernel: bool, expected: str, tmp_path: Path) -> None:
    with pytest.raises(DryRunFailed, match=expected):
        runner._found(ended(tmp_path, ""), runner._Ending(code, by_kernel, tmp_path / "log"))


def test_simulate_shows_what_there_is_and_leaves_with_3(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(jobs: list[object], *_: object) -> None:
        error = DryRunFailed("the dry run of zero2 failed: killed by SIGKILL")
        record = fixtures.bare_record()
        error.records = {0: dataclasses.replace(record, case=jobs[0].case)}  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(runner, "simulate", half)
    code, out, err = main("simulate", "-p", "cpu-demo", "--zero", "1,2", "--gpus", "2", "--recipe", "fp32", "-o", tmp_path / "x.json")

    assert code == 3
    assert "fp32" in out
    assert (tmp_path / "x.json").exists()
    assert "bf16prof: the dry run of zero2 failed: killed by SIGKILL" in err
