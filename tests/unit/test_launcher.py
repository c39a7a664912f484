"""How a case ended, told from what its ranks and torchrun have left in its folder; and the end of processes that do not want to end."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bf16prof import processes
from bf16prof.errors import InputError
from bf16prof.files import write_json
from bf16prof.measure import launcher, worker
from bf16prof.measure.launcher import Outcome, launch
from bf16prof.measure.results import RankResult, load_rank, save_rank
from bf16prof.measure.torchrun import RankFailure, load_failures
from bf16prof.processes import PARENT_VARIABLE, end_tree
from bf16prof.records import Device
from bf16prof.runs import FAILURES, LAUNCHER_LOG, Status, rank_file

TORCHRUN_TERM = -signal.SIGTERM


def result(rank: int, status: Status = Status.FINISHED, message: str = "") -> RankResult:
    return RankResult(rank, 1, status, Device.CPU, "cpu", parameters=1, message=message)


def write_failures(folder: Path, *failures: tuple[int, int, int]) -> list[RankFailure]:
    """What `measure/torchrun.py` writes: (rank, code, time) each."""
    rows = [RankFailure(*failure) for failure in failures]
    write_json(folder / FAILURES, {"failures": [dataclasses.asdict(row) for row in rows], "schema_version": 1})
    return rows


def outcome(folder: Path, code: int, *ranks: RankResult | None) -> Outcome:
    for rank in ranks:
        if rank is not None:
            save_rank(folder, rank)
    return launcher._outcome(folder, code, ranks)


def test_a_case_whose_ranks_all_finished_is_finished(tmp_path: Path) -> None:
    assert outcome(tmp_path, 0, result(0), result(1)) == Outcome(Status.FINISHED, "", "", (result(0), result(1)))


def test_a_missing_rank_file_fails_the_case(tmp_path: Path) -> None:
    (tmp_path / LAUNCHER_LOG).write_text("torchrun says\n", encoding="utf-8")
    found = outcome(tmp_path, 0, result(0), None, result(2))

    assert (found.status, found.message, found.log_tail) == (Status.FAILED, "no complete result from rank 1", "torchrun says")


def test_a_rank_that_left_without_finishing_fails_the_case(tmp_path: Path) -> None:
    found = outcome(tmp_path, 0, result(0, Status.RUNNING), result(1), result(2, Status.RUNNING))

    assert (found.status, found.message) == (Status.FAILED, "no complete result from rank 0, 2")


def test_a_truncated_rank_file_is_bad_input_that_names_the_file(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    path.write_text('{"rank": 0, "pid"', encoding="utf-8")

    with pytest.raises(InputError, match=str(path)):
        load_rank(tmp_path, 0)


@pytest.mark.parametrize(("code", "reason"), [(-9, "signal SIGKILL"), (1, "exit code 1")])
def test_torchrun_itself_may_fail(tmp_path: Path, code: int, reason: str) -> None:
    found = outcome(tmp_path, code, result(0), result(1))

    assert (found.status, found.message) == (Status.FAILED, f"torchrun ended with {reason}")


def test_the_failed_rank_is_named_with_its_own_words_and_its_log(tmp_path: Path) -> None:
    write_failures(tmp_path, (1, 1, 100))
    (tmp_path / "rank0.log").write_text("innocent\n", encoding="utf-8")
    (tmp_path / "rank1.log").write_text("".join(f"line {n}\n" for n in range(100)), encoding="utf-8")
    found = outcome(tmp_path, 1, result(0), result(1, Status.FAILED, "ValueError: no"))

    assert (found.status, found.message) == (Status.FAILED, "rank 1: ValueError: no")
    assert found.log_tail.splitlines() == [f"line {n}" for n in range(85, 100)]


def test_a_rank_that_said_nothing_is_named_with_its_exit_code(tmp_path: Path) -> None:
    write_failures(tmp_path, (1, 7, 100))

    assert outcome(tmp_path, 1, result(0), None).message == "rank 1: exit code 7"


def test_out_of_memory_is_the_cause_whichever_rank_failed_first(tmp_path: Path) -> None:
    write_failures(tmp_path, (0, 1, 100), (1, 1, 100))
    found = outcome(tmp_path, 1, result(0, Status.FAILED, "connection closed"), result(1, Status.OOM, "tried to allocate 5 bytes"))

    assert (found.status, found.message) == (Status.OOM, "rank 1: tried to allocate 5 bytes")


def test_what_a_rank_could_not_use_is_the_cause_whichever_rank_failed_first(tmp_path: Path) -> None:
    write_failures(tmp_path, (0, 1, 100), (1, 1, 100))
    found = outcome(tmp_path, 1, result(0, Status.FAILED, "connection closed"), result(1, Status.REFUSED, "no such model"))

    assert (found.status, found.message) == (Status.REFUSED, "rank 1: no such model")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("no such model", hint="install it"), Status.REFUSED, "no such model (install it)"),
        (InputError("no such model"), Status.REFUSED, "no such model"),
        (ValueError("one\ntwo"), Status.FAILED, "ValueError: one"),
        (KeyboardInterrupt(), Status.INTERRUPTED, "KeyboardInterrupt: "),
    ],
)
def test_a_rank_says_in_one_way_what_stopped_it(error: BaseException, status: Status, message: str) -> None:
    assert (worker._status(error), worker._message(error)) == (status, message)


def test_the_log_of_torchrun_stands_in_for_an_empty_one_of_the_rank(tmp_path: Path) -> None:
    write_failures(tmp_path, (0, 1, 100))
    (tmp_path / "rank0.log").write_text(" \n\n", encoding="utf-8")
    (tmp_path / LAUNCHER_LOG).write_bytes(b"\xff broken \n\n")

    assert outcome(tmp_path, 1, None).log_tail == "\ufffd broken"


def test_no_failures_file_means_no_failures(tmp_path: Path) -> None:
    assert load_failures(tmp_path / FAILURES) == []


@pytest.mark.parametrize(
    ("failures", "order"),
    [
        ([(0, 1, 100), (1, -9, 100)], [1, 0]),
        ([(0, 1, 100), (1, -11, 101)], [1, 0]),
        ([(0, TORCHRUN_TERM, 100), (1, 1, 100)], [1, 0]),
        ([(0, TORCHRUN_TERM, 100), (1, 1, 101)], [1, 0]),
        ([(0, 1, 101), (1, 2, 100)], [1, 0]),
        ([(2, 1, 100), (1, 1, 100), (0, TORCHRUN_TERM, 100)], [1, 2, 0]),
        ([(0, TORCHRUN_TERM, 100), (1, 1, 100), (2, -9, 102)], [2, 1, 0]),
    ],
)
def test_the_rank_that_failed_by_itself_comes_first(tmp_path: Path, failures: list[tuple[int, int, int]], order: list[int]) -> None:
    """torchrun's times are whole seconds, and a rank whose peer is gone fails within milliseconds."""
    write_failures(tmp_path, *failures)

    assert [failure.rank for failure in load_failures(tmp_path / FAILURES)] == order


def test_of_ranks_that_raised_the_first_to_write_why_comes_first(tmp_path: Path) -> None:
    write_failures(tmp_path, (0, 1, 100), (1, TORCHRUN_TERM, 100), (2, 1, 100), (3, TORCHRUN_TERM, 99))
    for rank, written in ((0, 1000.5), (1, 1000.4), (2, 1000.3)):
        save_rank(tmp_path, result(rank, Status.FAILED, "why"))
        os.utime(rank_file(tmp_path, rank), (written, written))
    save_rank(tmp_path, result(3, Status.RUNNING))
    os.utime(rank_file(tmp_path, 3), (1.0, 1.0))

    assert [failure.rank for failure in load_failures(tmp_path / FAILURES)] == [2, 1, 0, 3]


def test_reasons_are_words(tmp_path: Path) -> None:
    assert [RankFailure(0, code, 0).reason for code in (-6, 3)] == ["killed by SIGABRT", "exit code 3"]


def test_ranks_do_not_inherit_another_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launcher.UNWANTED_VARIABLES:
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("KEPT", "kept")
    variables = launcher._environment(2)

    assert not set(launcher.UNWANTED_VARIABLES) & set(variables)
    assert variables["KEPT"] == "kept"
    assert int(variables["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert variables[PARENT_VARIABLE] == str(os.getpid())


def test_the_users_own_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    assert launcher._environment(64)["OMP_NUM_THREADS"] == "3"


def test_only_shared_memory_that_appeared_meanwhile_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SHARED_MEMORY", tmp_path)
    old, new, foreign = (tmp_path / name for name in ("deepspeed_allreduce_buffer_1", "deepspeed_allreduce_buffer_2", "other"))
    old.touch()
    with pytest.raises(KeyboardInterrupt), launcher._clean_shared_memory():
        new.touch()
        foreign.touch()
        raise KeyboardInterrupt

    assert (old.exists(), new.exists(), foreign.exists()) == (True, False, True)


STUBBORN = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
FAMILY = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"


@pytest.mark.timeout(60)
def test_a_process_that_ignores_sigterm_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (child,) = psutil.Process(process.pid).children(recursive=True)
        end_tree(process)

        assert process.returncode is not None
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_ending_what_has_ended_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True) as process:
        process.wait()
        end_tree(process)

    assert process.returncode == 0


@pytest.mark.timeout(60)
def test_the_deadline_ends_a_launch_and_names_the_rank_that_came_least_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(launcher, "SHARED_MEMORY", tmp_path)
    save_rank(tmp_path, result(0, Status.RUNNING))
    (tmp_path / "rank1.log").write_text("stuck here\n", encoding="utf-8")
    progress: list[RankResult] = []
    found = launch(tmp_path, 2, 1.0, progress.append)

    assert (found.status, found.message) == (Status.TIMEOUT, "not finished after 1 s: all ranks were ended")
    assert found.log_tail == "stuck here"
    assert found.ranks == (result(0, Status.RUNNING), None)
    assert progress == [result(0, Status.RUNNING)], "told once, because nothing changed"


ORPHAN = """
import subprocess, sys
child = '''
import os, sys, time
while os.getppid() == int(os.environ["BF16PROF_PARENT"]):
    time.sleep(0.01)
from bf16prof.processes import die_with_parent
die_with_parent()
time.sleep(600)
'''
from bf16prof.processes import child_environment
print(subprocess.Popen([sys.executable, "-c", child], env=child_environment(), stdout=subprocess.DEVNULL).pid, flush=True)
"""


@pytest.mark.timeout(60)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_a_child_whose_parent_died_before_it_could_ask_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True)
    pid = int(done.stdout)

    deadline = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    if _runs(pid):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the orphan lives")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
