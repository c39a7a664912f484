"""What a person sees while ranks train: one line per case in a pipe, the state of rank 0 on a
terminal, nothing when quiet."""

from __future__ import annotations

import dataclasses

import pytest

from bf16prof.cases import Job
from bf16prof.commands.progress import ProgressWatcher
from bf16prof.measuring.results import RankResult
from bf16prof.profiles.load import load_profile
from bf16prof.profiles.recipes import find_recipe
from bf16prof.records import Case
from bf16prof.runs import CaseStatus, Status
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import Device

JOB = Job(Case("cpu-demo", 3, 2, "bf16-full"), load_profile("cpu-demo").profile, find_recipe("bf16-full"), Device.CPU)
FAILED = CaseStatus(JOB.case, Status.FAILED, "rank 1: killed by SIGKILL\x1b[31m\nsecond line")
YOUNG = RankResult(0, 1, Status.RUNNING, Device.CPU, "cpu")
BUILT = dataclasses.replace(YOUNG, parameters=5, run_peak_bytes=3 * 2**30)


def watch(watcher: ProgressWatcher) -> None:
    """A measurement of one case that fails."""
    with watcher:
        watcher.preparing("compiling allocator")
        watcher.case_begins(0, JOB)
        watcher.progress(YOUNG)
        watcher.case_ends(FAILED)


def test_in_a_pipe_it_prints_lines_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    watch(ProgressWatcher(1, quiet=False))
    captured = capsys.readouterr()

    assert captured.out == ""
    preparing, begins, *ends = captured.err.splitlines()
    assert preparing == "compiling allocator"
    assert begins == "[1/1] zero3-w2-bf16-full: starting 2 ranks"
    assert ends[0].startswith("[1/1] zero3-w2-bf16-full: failed: rank 1: killed by SIGKILL")
    assert "\x1b" not in captured.err


def test_quiet_leaves_only_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    watch(ProgressWatcher(1, quiet=True))

    assert capsys.readouterr().err.startswith("[1/1] zero3-w2-bf16-full: failed: ")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (YOUNG, "building the engine"),
        (BUILT, "engine is built"),
        (BUILT.with_step(StepRecord(0, 5.5, 0.1, 1)), "step 1  loss 5.500  peak 3.00 GiB"),
        (BUILT.with_step(StepRecord(0, 5.5, 0.1, 1)).with_step(StepRecord(1, None, 0.1, 1)), "step 2  loss not finite  peak 3.00 GiB"),
    ],
)
def test_rank_0_is_described(result: RankResult, expected: str) -> None:
    watcher = ProgressWatcher(2, quiet=False)
    watcher.case_begins(1, JOB)
    watcher.progress(result)

    assert watcher._progress.tasks[0].description == f"[2/2] zero3-w2-bf16-full: rank 0: {expected}"
