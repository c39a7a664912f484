"""What goes wrong in the field: ranks that die, hang or run out of memory, and bf16prof itself
being stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from harness import (
    Finished,
    alive,
    bf16prof,
    descendants,
    end,
    finish,
    inside,
    measure,
    measure_arguments,
    read_json,
    start,
    training,
    wait_for,
)

from bf16prof.measuring.shared_memory import SHARED_MEMORY, SHARED_MEMORY_NAMES
from bf16prof.records import MemoryRecord
from bf16prof.runs import Run, Status, load
from bf16prof.vocabulary import Source

pytestmark = pytest.mark.timeout(600)

ENOUGH_TO_DIE_S = 5.0
"""Seconds after which nothing of bf16prof's own may be alive once it was ended."""


def measurements(run: Run) -> list[MemoryRecord]:
    return [record for record in run.records if record.source is Source.MEASURE]


def partial_record(done: Finished, folder: Path, status: Status) -> MemoryRecord:
    """The only measurement of a run that failed in training: kept, marked, and without a steady
    state that nobody saw."""
    run = load(folder)
    assert done.code == 3
    assert run.manifest.status is status
    assert [case.status for case in run.manifest.cases] == [status]
    (record,) = measurements(run)
    assert record.notes[0].startswith(f"partial: {status}: ")
    assert record.allocated_bytes is None
    assert record.run_peak_allocated_bytes
    return record


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank_is_named_with_its_signal_and_the_rest_is_kept(tmp_path: Path, number: signal.Signals) -> None:
    with training(tmp_path / "run") as job:
        os.kill(job.ranks[1], number)
        done = finish(job.process)
        wait_for("all ranks are gone", job.gone, ENOUGH_TO_DIE_S)

    record = partial_record(done, job.folder, Status.FAILED)
    assert f"rank 1: killed by {number.name}" in done.stderr.splitlines()[-2]
    assert "Traceback" not in done.stderr
    assert record.steps
    assert load(job.folder).manifest.cases[0].log_tail
    assert (job.folder / "report.html").is_file()
    assert bf16prof("report", str(job.folder), "--quiet").code == 0


def test_a_killed_torchrun_takes_its_ranks_along(tmp_path: Path) -> None:
    with training(tmp_path / "run") as job:
        torchrun = next(process for process in job.family if "bf16prof.measuring.agent" in process.cmdline())
        torchrun.kill()
        done = finish(job.process)
        wait_for("all ranks are gone", job.gone, ENOUGH_TO_DIE_S)

    partial_record(done, job.folder, Status.FAILED)
    assert "torchrun ended with signal SIGKILL" in done.stderr


def test_a_rank_that_raises_is_named_although_the_others_fail_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = measure(folder, "--zero", "1", "--recipe", "bf16-full", env=inside("raise"), steps=10**6)

    record = partial_record(done, folder, Status.FAILED)
    (case,) = load(folder).manifest.cases
    assert case.message == "rank 1: ValueError: the test says so"
    assert "ValueError: the test says so" in case.log_tail
    assert case.log_tail.endswith("in two lines")
    assert case.message in done.stderr
    assert record.notes == (f"partial: failed: {case.message}",)
    assert read_json(folder / case.case.label / "rank1.json")["status"] == "failed"


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("os._exit", Status.FAILED, "rank 1: left with exit code 7"),
        ("sys.exit", Status.FAILED, "rank 1: left by sys.exit(0)"),
        ("SIGTERM", Status.FAILED, "rank 1: killed by SIGTERM"),
        ("garble", Status.FAILED, "rank 1: left with exit code 0 before it had finished"),
        ("no memory", Status.OOM, "rank 1: RuntimeError: [enforce fail at alloc_cpu.cpp"),
    ],
)
def test_a_rank_that_leaves_is_blamed_and_not_the_one_that_noticed(tmp_path: Path, how: str, status: Status, reason: str) -> None:
    folder, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    done = measure(folder, "--zero", "1", "--recipe", "bf16-full", env={**inside(how), "TMPDIR": str(temporary)}, steps=10**6)

    partial_record(done, folder, status)
    (case,) = load(folder).manifest.cases
    assert case.message.startswith(reason)
    assert "Traceback" not in done.stderr
    assert [path.name for path in temporary.iterdir() if path.name.startswith("torchelastic")] == []


@pytest.mark.alone
def test_a_hanging_rank_ends_in_a_timeout(tmp_path: Path) -> None:
    with training(tmp_path / "run", "--timeout", "25") as job:
        os.kill(job.ranks[0], signal.SIGSTOP)
        done = finish(job.process)
        wait_for("all ranks are gone", job.gone, ENOUGH_TO_DIE_S)

    record = partial_record(done, job.folder, Status.TIMEOUT)
    assert re.search(
        r"not finished after 25 s: rank 0 was (in forward of|in backward of|in the optimizer's part of|between steps, after) step \d",
        done.stderr,
    )
    assert record.steps


@dataclass(frozen=True)
class Starved:
    """A run of two cases whose memory is enough for one of them."""

    done: Finished
    run: Run
    limit: int


@pytest.fixture(scope="module")
def starved(tmp_path_factory: pytest.TempPathFactory) -> Starved:
    """Both get through init; training peaks at 2.4 million bytes in fp32 and at 1.25 million in
    bf16-full."""
    folder, limit = tmp_path_factory.mktemp("starved") / "run", 1_700_000
    small_bucket = "deepspeed.zero_optimization.reduce_bucket_size=10007"
    limited = {"BF16PROF_CPU_MEMORY_LIMIT": str(limit)}
    done = measure(folder, "--zero", "1", "--recipe", "fp32,bf16-full", "--set", small_bucket, env=limited)
    return Starved(done, load(folder), limit)


@pytest.mark.xdist_group("starved")
def test_out_of_memory_is_told_with_what_was_asked_for_and_the_peak_so_far(starved: Starved) -> None:
    record = next(record for record in measurements(starved.run) if record.case.recipe == "fp32")
    case = starved.run.manifest.cases[0]
    found = re.search(r"Tried to allocate (\d+) bytes with (\d+) allocated", case.message)

    assert starved.done.code == 3
    assert case.status is starved.run.manifest.status is Status.OOM
    assert found
    requested, allocated = map(int, found.groups())
    assert requested + allocated > starved.limit >= (record.run_peak_allocated_bytes or 0) >= allocated > 0
    assert record.notes[0].startswith("partial: oom: ")
    assert case.message in starved.done.stderr


@pytest.mark.xdist_group("starved")
def test_a_case_that_fails_does_not_stop_the_next(starved: Starved) -> None:
    assert [case.status for case in starved.run.manifest.cases] == [Status.OOM, Status.FINISHED]
    survivor = next(record for record in measurements(starved.run) if record.case.recipe == "bf16-full")
    assert survivor.allocated_bytes
    assert not survivor.notes
    assert "1 of 2 cases did not finish" in starved.done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_in_training_it_ends_its_ranks_and_leaves_a_valid_run(tmp_path: Path, number: signal.Signals) -> None:
    with training(tmp_path / "run") as job:
        job.process.send_signal(number)
        done = finish(job.process, limit_s=30)
        assert job.gone()

    run = load(job.folder)
    assert done.code == 128 + number
    assert done.stderr.splitlines()[-1] == "bf16prof: interrupted"
    assert "Traceback" not in done.stderr
    assert run.manifest.status is Status.INTERRUPTED
    assert [case.status for case in run.manifest.cases] == [Status.INTERRUPTED]
    assert run.manifest.finished
    assert [path.name for path in job.folder.rglob(".*")] == []


def test_killed_in_training_it_takes_its_ranks_along(tmp_path: Path) -> None:
    with training(tmp_path / "run") as job:
        assert not job.gone()
        job.process.kill()
        wait_for("all ranks are gone", job.gone, ENOUGH_TO_DIE_S)

    assert read_json(job.folder / "run.json")["status"] == "running"
    assert load(job.folder).manifest.status is Status.INTERRUPTED, "its process is gone"
    assert bf16prof("report", str(job.folder), "--quiet").code == 0


def test_killed_while_ranks_start_it_takes_them_along(tmp_path: Path) -> None:
    """The moment a rank exists: before it had a chance to ask for its parent's fate."""
    process = start(*measure_arguments(tmp_path / "run", "--zero", "1", "--recipe", "bf16-full"))
    family: list[psutil.Process] = []

    def a_rank_has_started() -> bool:
        family[:] = descendants(process)
        return any("bf16prof.measuring.worker" in child.cmdline() for child in alive(family))

    try:
        wait_for("a rank has started", a_rank_has_started)
        process.kill()
        wait_for("all ranks are gone", lambda: not alive(family), ENOUGH_TO_DIE_S)
    finally:
        end(process)


# What is allocated between steps is exact. A peak on CPU ranks is not: the loss, its gradient and
# gloo's counters are a few bytes each, and gloo's threads let go of them at a time of their own. A
# ten-thousandth of a percent of this job's 42 MB is 42 bytes.
A_FEW_BYTES = "0.001%"


@dataclass(frozen=True)
class Surroundings:
    """A run where another launcher's variables are set and its port is taken: its end, its folder,
    and the shared memory it left."""

    done: Finished
    folder: Path
    left: set[Path]


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    folder = tmp_path_factory.mktemp("surroundings") / "run"
    foreign = {"LOCAL_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    before = set(SHARED_MEMORY.glob(SHARED_MEMORY_NAMES))
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("", 29500))
        taken.listen()
        done = measure(folder, "--zero", "1", "--recipe", "bf16-full", "--fail-over", A_FEW_BYTES, env=foreign)
    yield Surroundings(done, folder, set(SHARED_MEMORY.glob(SHARED_MEMORY_NAMES)) - before)


@pytest.mark.alone
def test_a_taken_rendezvous_port_and_another_launchers_variables_do_not_matter(surroundings: Surroundings) -> None:
    assert surroundings.done.code == 0, surroundings.done.stderr
    assert surroundings.done.record("measure", 1, "bf16-full")["case"]["world_size"] == 2


@pytest.mark.alone
def test_no_shared_memory_is_left_behind(surroundings: Surroundings) -> None:
    assert surroundings.left == set()


@pytest.mark.alone
def test_fail_over_looks_at_every_prediction(surroundings: Surroundings) -> None:
    """Predictions that are right pass a narrow tolerance (the fixture gave it); a measurement that
    says otherwise does not."""
    records = surroundings.folder / "records.json"
    text = records.read_text(encoding="utf-8")
    try:
        assert bf16prof("report", str(surroundings.folder), "--fail-over", A_FEW_BYTES).code == 0
        document = read_json(records)
        added = document["records"][-1]["allocated_bytes"] // 50
        document["records"][-1]["allocated_bytes"] += added
        document["records"][-1]["components"]["parameters"] += added
        records.write_text(json.dumps(document), encoding="utf-8")
        tampered = bf16prof("report", str(surroundings.folder), "--fail-over", "1%")
        generous = bf16prof("report", str(surroundings.folder), "--fail-over", "3%")
    finally:
        records.write_text(text, encoding="utf-8")

    assert (tampered.code, generous.code) == (4, 0)
    assert "estimate of allocated_bytes in zero1-w2-bf16-full is -1.96% off" in tampered.stderr
