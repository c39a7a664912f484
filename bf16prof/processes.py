"""Processes of ours: they never outlive their parent, and they are ended as a whole."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from bf16prof.errors import InputError

PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "BF16PROF_PARENT"
"""The process id of whoever started this process, which may be dead before this process gets to
ask."""

TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch's compiler keeps things (torch/_inductor/runtime/cache_dir_utils.py); importing it
makes that folder."""

GRACE_S = 3.0
"""How long ranks get between SIGTERM and SIGKILL."""


def child_environment(scratch: Path | None = None) -> dict[str, str]:
    """This process's environment for a child that calls `die_with_parent`. `scratch`: a folder for
    what torch would leave in `TMPDIR`."""
    kept = {} if scratch is None else {TORCH_CACHE: str(scratch / "torch")}
    return {**kept, **os.environ, PARENT_VARIABLE: str(os.getpid())}


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to kill this process when its parent dies, however the parent dies; a no-op
    elsewhere. The request survives exec."""
    if not sys.platform.startswith("linux"):
        return
    parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it died before the request was in place
        os._exit(1)
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def signal_name(number: int) -> str:
    """`SIGKILL`; `signal 64` where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole_memory() -> int:
    """The bytes of memory of this machine, which the C library knows without `/proc`."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def threads_per_rank(world_size: int) -> int:
    """Threads that each of so many ranks on this machine computes with, unless `OMP_NUM_THREADS`
    says otherwise."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) else max(1, usable_cores() // world_size)


@contextlib.contextmanager
def started(
    command: Sequence[str],
    log: Path | None,
    env: Mapping[str, str],
    first: signal.Signals = signal.SIGTERM,
    stdin: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a session of its own, its output in a log; at the end of the block it and
    all it has started are ended.

    Without a log it writes where this process does. `first` is the signal that they get first:
    SIGKILL where there is nothing that they could put in order.
    """
    with contextlib.nullcontext() if log is None else log.open("wb") as stream:
        process = subprocess.Popen(command, env=env, stdin=stdin, stdout=stream, stderr=stream, start_new_session=True)
        try:
            yield process
        finally:
            if process.stdin is not None:
                process.stdin.close()
            end_tree(process, first)


def end_tree(process: subprocess.Popen[bytes], first: signal.Signals = signal.SIGTERM) -> None:
    """End a process and all its descendants: `first`, then SIGKILL for what is left after
    `GRACE_S`."""
    family = _family(process)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, first)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(first)
    alive = _alive_after(family, GRACE_S)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    _alive_after(alive, GRACE_S)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def kill_session(leader: int) -> None:
    """Kill all processes of a session, the caller last if it is one of them.

    Compilers are found by their session alone: ninja gives each a process group of its own, and
    they outlive it.
    """
    others = [process for process in _session(leader) if process.pid != os.getpid()]
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if os.getsid(0) == leader:
        os.kill(os.getpid(), signal.SIGKILL)


def can_list() -> bool:
    """Whether the processes of this machine can be looked at. Without `/proc` only a group can be
    ended, unseen."""
    return Path("/proc/self/stat").exists() or not sys.platform.startswith("linux")


def require_proc(what: str) -> None:
    """Raise `InputError` where there is no `/proc`, which DeepSpeed reads, and where we find the
    processes of a run."""
    if not can_list():
        raise InputError(f"{what} needs /proc", hint="mount it: mount -t proc proc /proc; estimate, plan, import and report do without")


def _family(leader: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The descendants of a session's leader, and those in its session whose parents are gone."""
    if not can_list():
        return []
    if leader.returncode is not None and psutil.pid_exists(leader.pid):
        return []  # it was buried, and its number is another's by now
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(leader.pid).children(recursive=True)
    return list({process.pid: process for process in (*descendants, *_session(leader.pid)) if process.pid != leader.pid}.values())


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def _alive_after(processes: Sequence[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Those that still run when all have ended or the time is over. A zombie that its new parent
    has not buried yet has ended."""
    deadline = time.monotonic() + limit_s
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
