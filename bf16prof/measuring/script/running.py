"""Runs a script in this process as one rank of somebody's job, with the probes attached before its
first import."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from bf16prof.errors import InputError
from bf16prof.measuring.results import GuestTask
from bf16prof.runs import SCRIPT_FOLDER, Status, rank_file
from bf16prof.scripts.hooks import nothing_built
from bf16prof.scripts.main import Ending, run
from bf16prof.whereabouts import Whereabouts


def run_attached(
    task: GuestTask, run_folder: Path, *, replace: bool = False, deadline: float | None = None, is_launched: bool = False
) -> int:
    """Run the script to its end; the exit code that python would leave with. The rank's result is
    written into the run directory.

    `is_launched`: we have started the ranks, by torchrun; `deadline`: when this one will be ended,
    by the monotonic clock. Raises `InputError` before the script begins where there is a result of
    this rank already, or where it cannot be written.
    """
    folder = claimed_rank(run_folder, replace=replace)
    whereabouts = None if deadline is None else Whereabouts(folder, int(os.environ.get("RANK", "0")), deadline)
    import torch

    from bf16prof.measuring.script.probes import make_guest_probe
    from bf16prof.measuring.script.rank import GuestRank

    with own_extensions():
        probe, shown = make_guest_probe()
    exit_now, pid = os._exit, os.getpid()

    def enough() -> None:
        if task.is_ended:
            torch.distributed.barrier()  # the others may not have all that this rank has sent
            rank.end(Status.FINISHED)
            _leave(0)

    def leave(code: int) -> NoReturn:
        if os.getpid() == pid:
            rank.end(*_how(task, rank, Ending(code & 0xFF, f"left by os._exit({code})")))
        exit_now(code)

    def _leave(code: int) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        exit_now(code)

    rank = GuestRank(task, folder, probe, enough, whereabouts)
    with shown, rank.watching(), _as_by_a_launcher(rank.note) if is_launched else contextlib.nullcontext():
        os._exit = leave  # type: ignore[assignment]
        try:
            rank.save()
            rank.watch.begin()
            ending = run(task.script)
        except KeyboardInterrupt:
            rank.end(Status.INTERRUPTED, "KeyboardInterrupt", stopped_at=time.monotonic())
            raise
        finally:
            os._exit = exit_now
        rank.end(*_how(task, rank, ending), **_details(ending))
    return ending.code


@contextlib.contextmanager
def _as_by_a_launcher(note: Callable[[str], None]) -> Iterator[None]:
    """What a script that torchrun has started finds, and the argument that DeepSpeed's launcher
    would give it."""
    from bf16prof.measuring.script.meeting import at_torchrun
    from bf16prof.scripts import arguments
    from bf16prof.scripts.face.worn import replaced

    with at_torchrun(note), replaced(arguments.replacements(int(os.environ["LOCAL_RANK"]))):
        yield


def claimed_rank(run_folder: Path, *, replace: bool = False) -> Path:
    """The folder for this rank's result. Raises `InputError` where it has one already, or where the
    folder cannot be made."""
    folder, rank = run_folder.resolve() / SCRIPT_FOLDER, int(os.environ.get("RANK", "0"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {error.filename or folder}: {error.strerror}") from error
    if rank_file(folder, rank).exists() and not replace:
        raise InputError(f"{rank_file(folder, rank)} exists", hint="choose another --output-dir, or add --force to replace the run in it")
    return folder


@contextlib.contextmanager
def own_extensions() -> Iterator[None]:
    """Compile the counting allocator for ranks on the CPU, once for all of this host; the script's
    own extensions stay where they are.

    A lock that a killed process has left in the cache of extensions is waited for by nobody
    (`batons.py`).
    """
    from bf16prof.measuring.batons import use_dying_batons
    from bf16prof.measuring.cache import CACHE_VARIABLE
    from bf16prof.measuring.prepare import ALLOCATOR, prepare_parts

    before = {name: os.environ.get(name) for name in (CACHE_VARIABLE, "PATH")}
    use_dying_batons()
    prepare_parts([ALLOCATOR], lambda text: None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _how(task: GuestTask, rank: Any, ending: Ending) -> tuple[Status, str]:
    """The status of a rank whose script has ended so, and a line on it."""
    name, result = task.script.name, rank.result
    if ending.code:
        return Status.FAILED, f"{name} {ending.message}"
    if not rank.watch.engines:
        return Status.REFUSED, f"{name} ended: {nothing_built()}"
    if not result.steps:
        return Status.REFUSED, f"{name} ended: no optimizer step of its engine was taken"
    return Status.FINISHED, ""


def _details(ending: Ending) -> dict[str, Any]:
    """What tells causes from consequences where several ranks fail."""
    if ending.error is None:
        return {}
    from bf16prof.measuring.worker import has_noticed

    return {"stopped_at": time.monotonic(), "noticed": has_noticed(ending.error)}
