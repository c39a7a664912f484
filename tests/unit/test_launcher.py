"""How a case ended, told from what its ranks and torchrun have left in its folder; and the end of
processes that do not want to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bf16prof import processes
from bf16prof.errors import InputError
from bf16prof.files import NotWritten
from bf16prof.measuring import launcher, shared_memory, worker
from bf16prof.measuring.blame import blame
from bf16prof.measuring.exits import RankExit, load_exits, save_exits
from bf16prof.measuring.launcher import RanksOutcome, launch
from bf16prof.measuring.places import LOCAL
from bf16prof.measuring.results import RankResult, load_rank, save_rank
from bf16prof.measuring.surroundings import UNWANTED_VARIABLES, rank_environment
from bf16prof.processes import PARENT_VARIABLE, end_tree
from bf16prof.runs import EXITS, LAUNCHER_LOG, Status, rank_file
from bf16prof.vocabulary import Device
from bf16prof.whereabouts import Whereabouts

TERM = -signal.SIGTERM


def result(rank: int, status: Status = Status.FINISHED, message: str = "", at: float | None = None, noticed: bool = False) -> RankResult:
    return RankResult(rank, 1, status, Device.CPU, "cpu", parameters=1, message=message, stopped_at=at, noticed=noticed)


def outcome(folder: Path, code: int, *ranks: RankResult | None, exits: Sequence[RankExit] = (), by_kernel: bool = False) -> RanksOutcome:
    """How a case ended in whose folder these results and these ends of ranks lie."""
    for rank in ranks:
        if rank is not None:
            save_rank(folder, rank)
    save_exits(folder / EXITS, {each.rank: each for each in exits})
    seen = launcher._Seen.of(folder, len(ranks))
    return launcher._outcome(folder, code, seen, blame(seen.exits, seen.ranks, by_kernel=by_kernel))


def test_a_case_whose_ranks_all_finished_is_finished(tmp_path: Path) -> None:
    assert outcome(tmp_path, 0, result(0), result(1)) == RanksOutcome(Status.FINISHED, "", "", (result(0), result(1)))


def test_a_missing_rank_file_fails_the_case(tmp_path: Path) -> None:
    (tmp_path / LAUNCHER_LOG).write_text("torchrun says\n", encoding="utf-8")
    found = outcome(tmp_path, 0, result(0), None, result(2))

    assert (found.status, found.message, found.log_tail) == (Status.FAILED, "no complete result from rank 1", "torchrun says")


def test_a_garbled_rank_file_fails_the_case_and_is_named(tmp_path: Path) -> None:
    rank_file(tmp_path, 1).write_text('{"rank": 1, "pid"', encoding="utf-8")
    found = outcome(tmp_path, 0, result(0), None)

    assert found.status is Status.FAILED
    assert found.message.startswith(f"no complete result from rank 1; {rank_file(tmp_path, 1)}: not a complete JSON document")
    assert found.ranks == (result(0), None)


def test_a_garbled_file_of_exits_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / EXITS).write_text("{", encoding="utf-8")
    seen = launcher._Seen.of(tmp_path, 1)

    assert launcher._outcome(tmp_path, 1, seen, None).message.startswith(f"torchrun ended with exit code 1; {tmp_path / EXITS}: not a")


def test_a_rank_that_left_without_finishing_fails_the_case(tmp_path: Path) -> None:
    found = outcome(tmp_path, 0, result(0, Status.RUNNING), result(1), result(2, Status.RUNNING))

    assert (found.status, found.message) == (Status.FAILED, "no complete result from rank 0, 2")


def test_a_truncated_rank_file_is_bad_input_that_names_the_file(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    path.write_text('{"rank": 0, "pid"', encoding="utf-8")

    with pytest.raises(InputError, match=str(path)):
        load_rank(tmp_path, 0)


@pytest.mark.parametrize(("code", "reason"), [(-9, "signal SIGKILL"), (1, "exit code 1"), (143, "signal SIGTERM")])
def test_torchrun_itself_may_fail(tmp_path: Path, code: int, reason: str) -> None:
    found = outcome(tmp_path, code, result(0), result(1))

    assert (found.status, found.message) == (Status.FAILED, f"torchrun ended with {reason}")


def test_the_failed_rank_is_named_with_its_own_words_and_its_log(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_text("innocent\n", encoding="utf-8")
    (tmp_path / "rank1.log").write_text("".join(f"line {n}\n" for n in range(100)), encoding="utf-8")
    found = outcome(tmp_path, 1, result(0), result(1, Status.FAILED, "ValueError: no", 5.0), exits=[RankExit(1, 1, 5.5)])

    assert (found.status, found.message) == (Status.FAILED, "rank 1: ValueError: no")
    assert found.log_tail.splitlines() == [f"line {n}" for n in range(85, 100)]


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
RESET = (Status.FAILED, "RuntimeError: Connection reset by peer", 10.2, True)
RUNNING = (Status.RUNNING, "", None)


@pytest.mark.parametrize(
    ("ranks", "exits", "blamed"),
    [
        # os._exit: it says nothing; the other does, later.
        ([RESET, RUNNING], [(0, 1, 10.4), (1, 7, 10.1)], "rank 1: left with exit code 7"),
        ([RUNNING, RESET], [(0, 7, 10.1), (1, 1, 10.4)], "rank 0: left with exit code 7"),
        ([RUNNING, RESET], [(0, 0, 10.1), (1, 1, 10.4)], "rank 0: left with exit code 0 before it had finished"),
        ([None, RESET], [(0, 7, 10.1), (1, 1, 10.4)], "rank 0: left with exit code 7"),
        # A signal from outside, also the one that torchrun sends.
        ([RESET, RUNNING], [(0, 1, 10.4), (1, TERM, 10.1)], "rank 1: killed by SIGTERM"),
        ([RESET, RUNNING], [(0, 1, 10.4), (1, -9, 10.1)], "rank 1: killed by SIGKILL"),
        ([RESET, RUNNING], [(0, 1, 10.4), (1, -11, 10.1)], "rank 1: killed by SIGSEGV"),
        # The kernel closes connections before it says that a process is gone.
        ([RESET, RUNNING], [(0, 1, 10.4), (1, 7, 10.3)], "rank 1: left with exit code 7"),
        ([RESET, RUNNING], [(0, 1, 10.4), (1, TERM, 10.3)], "rank 1: killed by SIGTERM"),
        # What went wrong in a rank later is not the cause although another notices that as well.
        ([(Status.FAILED, "ValueError: no", 10.0), RUNNING], [(0, 1, 10.9), (1, -6, 10.5)], "rank 0: ValueError: no"),
        # torchrun's own come after the cause.
        ([RUNNING, RUNNING, RESET], [(0, TERM, 10.9), (1, TERM, 10.8), (2, 1, 10.4)], "rank 2: RuntimeError: Connection reset by peer"),
        # What was raised counts from when it was, not from when its process was gone.
        ([RESET, (Status.FAILED, "left by sys.exit(3)", 10.1)], [(0, 1, 10.3), (1, 3, 12.0)], "rank 1: left by sys.exit(3)"),
        ([RESET, (Status.FAILED, "ValueError: no", 10.1)], [(0, 1, 10.3), (1, TERM, 12.0)], "rank 1: ValueError: no"),
        # When they ended nobody saw: torchrun's codes.
        ([RUNNING, RUNNING], [(0, 1, None), (1, -9, None)], "rank 1: killed by SIGKILL"),
        ([RUNNING, RUNNING], [(0, TERM, None), (1, 1, None)], "rank 1: left with exit code 1"),
        ([RUNNING, RUNNING], [(0, 1, None), (1, 2, None)], "rank 0: left with exit code 1"),
    ],
)  # fmt: skip
def test_the_first_in_time_is_blamed(
    tmp_path: Path, ranks: list[tuple[Any, ...] | None], exits: list[tuple[int, int, float | None]], blamed: str
) -> None:
    results = [None if rank is None else result(number, *rank) for number, rank in enumerate(ranks)]
    found = outcome(tmp_path, 1, *results, exits=[RankExit(*each) for each in exits])

    assert (found.status, found.message) == (Status.FAILED, blamed)


@pytest.mark.parametrize(("status", "message"), [(Status.OOM, "tried to allocate 5 bytes"), (Status.REFUSED, "no such model")])
def test_what_one_rank_only_can_have_is_the_cause(tmp_path: Path, status: Status, message: str) -> None:
    """First in time, or where no time is known."""
    first = outcome(tmp_path, 1, result(0, *RESET), result(1, status, message, 10.1), exits=[RankExit(0, 1, 10.3), RankExit(1, 1, 10.4)])
    unknown = outcome(tmp_path, 1, result(0, Status.FAILED, "connection closed"), result(1, status, message))

    assert (first.status, first.message) == (unknown.status, unknown.message) == (status, f"rank 1: {message}")


def test_a_rank_that_the_kernel_killed_for_memory_is_out_of_memory(tmp_path: Path) -> None:
    ranks = (result(0, *RESET), result(1, Status.RUNNING))
    exits = [RankExit(0, 1, 10.3), RankExit(1, -9, 10.1)]

    found = outcome(tmp_path, 1, *ranks, exits=exits, by_kernel=True)

    assert (found.status, found.message) == (Status.OOM, "rank 1: killed by the kernel, for there was no memory left (SIGKILL)")
    assert outcome(tmp_path, 1, *ranks, exits=exits).status is Status.FAILED


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("no such model", hint="install it"), Status.REFUSED, "no such model (install it)"),
        (InputError("no such model"), Status.REFUSED, "no such model"),
        (ValueError("one\ntwo"), Status.FAILED, "ValueError: one"),
        (KeyboardInterrupt(), Status.INTERRUPTED, "KeyboardInterrupt: "),
        (SystemExit(3), Status.FAILED, "left by sys.exit(3)"),
        (MemoryError("std::bad_alloc"), Status.OOM, "MemoryError: std::bad_alloc"),
        (RuntimeError(NO_MEMORY), Status.OOM, f"RuntimeError: {NO_MEMORY}"),
        (NotWritten("cannot write rank0.json: No space left on device"), Status.FAILED, "cannot write rank0.json: No space left on device"),
    ],
)
def test_a_rank_says_in_one_way_what_stopped_it(error: BaseException, status: Status, message: str) -> None:
    assert (worker._status(error), worker._message(error)) == (status, message)


def test_the_log_of_torchrun_stands_in_for_an_empty_one_of_the_rank(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_text(" \n\n", encoding="utf-8")
    (tmp_path / LAUNCHER_LOG).write_bytes(b"\xff broken \n\n")

    assert outcome(tmp_path, 1, None, exits=[RankExit(0, 1, 1.0)]).log_tail == "\ufffd broken"


def test_no_file_means_no_exits(tmp_path: Path) -> None:
    assert load_exits(tmp_path / EXITS) == {}


@pytest.mark.parametrize(
    ("error", "noticed"),
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:2"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection reset by peer"), False),
        (SystemExit(1), False),
    ],
)
def test_who_only_noticed_says_so(error: BaseException, noticed: bool) -> None:
    assert worker.has_noticed(error) is noticed


def test_reasons_are_words() -> None:
    reasons = ["killed by SIGABRT", "left with exit code 3", "killed by signal 64"]
    assert [RankExit(0, code).reason for code in (-6, 3, -64)][:2] == reasons[:2]


WATCHED = """
import os, subprocess, sys, time
from bf16prof.measuring.exits import ExitWatch

seen = []
watch = ExitWatch(3, seen.append)
watch.start()
head = "import os, sys; sys.stdin.read(); "
programs = [head + text for text in ("", "os._exit(7)", "os.kill(os.getpid(), 15)")]
children = [
    subprocess.Popen([sys.executable, "-c", text], env={**os.environ, "RANK": str(rank)}, stdin=subprocess.PIPE)
    for rank, text in enumerate(programs)
]
while watch._missing:
    time.sleep(0.01)
for count, rank in enumerate((1, 0, 2), 1):
    children[rank].stdin.close()
    while len(seen) < count:
        time.sleep(0.01)
print([(each.rank, each.code) for each in seen], sorted(seen, key=lambda each: each.at) == seen)
print([child.wait() for child in children])
"""


@pytest.mark.timeout(60)
def test_ranks_are_seen_in_the_order_in_which_they_end_and_stay_for_torchrun_to_bury() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["[(1, 7), (0, 0), (2, -15)] True", "[0, 7, -15]"]


def test_ranks_do_not_inherit_another_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNWANTED_VARIABLES:
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("KEPT", "kept")
    variables = rank_environment(2)

    assert not set(UNWANTED_VARIABLES) & set(variables)
    assert variables["KEPT"] == "kept"
    assert int(variables["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert variables[PARENT_VARIABLE] == str(os.getpid())


def test_the_users_own_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    assert rank_environment(64)["OMP_NUM_THREADS"] == "3"


def test_only_shared_memory_that_appeared_meanwhile_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    old, new, foreign = (tmp_path / name for name in ("deepspeed_allreduce_buffer_1", "deepspeed_allreduce_buffer_2", "other"))
    old.touch()
    with pytest.raises(KeyboardInterrupt), shared_memory.clean_shared_memory():
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
    monkeypatch.setattr(launcher, "local_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    save_rank(tmp_path, result(0, Status.RUNNING))
    Whereabouts(tmp_path, 0, None)
    (tmp_path / "rank1.log").write_text("stuck here\n", encoding="utf-8")
    progress: list[RankResult] = []
    found = launch(tmp_path, LOCAL, 2, 1.0, progress.append)

    assert (found.status, found.message) == (Status.TIMEOUT, "not finished after 1 s: rank 1 was not there yet")
    assert found.log_tail == "stuck here"
    assert found.ranks == (result(0, Status.RUNNING), None)
    assert progress == [result(0, Status.RUNNING)], "told once, because nothing changed"
    assert not list(tmp_path.glob("*.where"))


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
