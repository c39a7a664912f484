"""Start the ranks of one case with torchrun, in a session of their own; wait; end them all; say how it ended.

torchrun runs inside a small process of ours (`measure/torchrun.py`) that dies with bf16prof and writes which rank failed how into a file;
nothing is parsed from what anybody prints. Each worker dies with torchrun. So whatever happens to bf16prof - Ctrl-C, SIGTERM, SIGKILL -
no process of its own outlives it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bf16prof.errors import SIGNALLED, InputError
from bf16prof.files import last_lines
from bf16prof.measure.blame import Cause, blame
from bf16prof.measure.exits import RankExit, load_exits
from bf16prof.measure.results import RankResult, load_rank
from bf16prof.memory_kills import MemoryKills
from bf16prof.processes import child_environment, signal_name, started, threads_per_rank
from bf16prof.runs import EXITS, LAUNCHER_LOG, SPEC, Status, rank_log

T = TypeVar("T")
POLL_S = 0.2
LOG_LINES = 15
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NAMES = "deepspeed_allreduce_buffer_*"
"""DeepSpeed's shared-memory collectives leave these behind (csrc/cpu/comm/shm.cpp), 69 MB a rank."""

UNWANTED_VARIABLES = ("LOCAL_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
"""Left over from another launcher: LOCAL_SIZE makes DeepSpeed take its shared-memory path, the others would confuse torchrun."""


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one case ended: status, one line for a person, the end of the failing rank's log, and what every rank wrote."""

    status: Status
    message: str
    log_tail: str
    ranks: tuple[RankResult | None, ...]


@dataclass(frozen=True)
class _Seen:
    """What lies in the folder of a case: each rank's result, the ends of ranks, and why files among them could not be read."""

    ranks: tuple[RankResult | None, ...]
    exits: dict[int, RankExit]
    unread: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, world_size: int) -> _Seen:
        """All that can be read now; a file that cannot be is as if it were not there."""
        unread: list[str] = []
        ranks = tuple(_readable(functools.partial(load_rank, folder, rank), unread) for rank in range(world_size))
        exits = _readable(functools.partial(load_exits, folder / EXITS), unread)
        return cls(ranks, exits or {}, tuple(unread))


def _readable(load: Callable[[], T], unread: list[str]) -> T | None:
    try:
        return load()
    except InputError as error:
        unread.append(error.message)
        return None


def launch(folder: Path, world_size: int, timeout_s: float, on_progress: Callable[[RankResult], None]) -> Outcome:
    """Run the case whose `SPEC` lies in the folder on that many ranks of this machine.

    `on_progress` gets rank 0's result whenever it has changed. On KeyboardInterrupt the ranks are ended before it is raised again.
    """
    kills = MemoryKills()
    early: _Seen | None = None
    with _clean_shared_memory(), started(_command(folder, world_size), folder / LAUNCHER_LOG, _environment(world_size)) as process:
        if not _wait(process, folder, time.monotonic() + timeout_s, on_progress):
            early = _Seen.of(folder, world_size)  # before the others are ended, who then fail as well
    seen = _Seen.of(folder, world_size)
    cause = blame((early or seen).exits, (early or seen).ranks, by_kernel=kills.happened())
    if cause is None and early is not None:
        message = f"not finished after {timeout_s:g} s: all ranks were ended"
        return Outcome(Status.TIMEOUT, message, _tail(_slowest_log(folder, seen.ranks)), seen.ranks)
    return _outcome(folder, process.returncode, seen, cause)


def _outcome(folder: Path, code: int, seen: _Seen, cause: Cause | None) -> Outcome:
    """How a case ended whose ranks have ended by themselves, or the cause why they had to be."""
    if cause is not None:
        log = _tail(rank_log(folder, cause.rank), folder / LAUNCHER_LOG)
        return Outcome(cause.status, f"rank {cause.rank}: {cause.message}", log, seen.ranks)
    missing = [rank for rank, result in enumerate(seen.ranks) if result is None or result.status is not Status.FINISHED]
    if code == 0 and not missing:
        return Outcome(Status.FINISHED, "", "", seen.ranks)
    what = f"torchrun ended with {_exit(code)}" if code else f"no complete result from rank {', '.join(map(str, missing))}"
    return Outcome(Status.FAILED, "; ".join([what, *seen.unread]), _tail(folder / LAUNCHER_LOG), seen.ranks)


def _command(folder: Path, world_size: int) -> list[str]:
    return [
        sys.executable, "-m", "bf16prof.measure.torchrun", str(folder / EXITS), str(world_size),
        "--standalone", "--nproc-per-node", str(world_size), "--max-restarts", "0", "--log-dir", os.devnull,
        "-m", "bf16prof.measure.worker", str(folder / SPEC), str(folder),
    ]  # fmt: skip


def _environment(world_size: int) -> dict[str, str]:
    variables = {key: value for key, value in child_environment().items() if key not in UNWANTED_VARIABLES}
    return {"TOKENIZERS_PARALLELISM": "false", **variables, "OMP_NUM_THREADS": str(threads_per_rank(world_size))}


def _wait(process: subprocess.Popen[bytes], folder: Path, deadline: float, on_progress: Callable[[RankResult], None]) -> bool:
    """Wait for the end of the process; False when the deadline comes first."""
    seen: RankResult | None = None
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
        result = _readable(functools.partial(load_rank, folder, 0), [])
        if result is not None and result != seen:
            on_progress(result)
            seen = result
    return True


def _exit(code: int) -> str:
    number = -code if code < 0 else code - SIGNALLED
    return f"signal {signal_name(number)}" if number > 0 else f"exit code {code}"


def _slowest_log(folder: Path, ranks: tuple[RankResult | None, ...]) -> Path:
    """The log of the rank that has come least far."""
    steps = [len(r.steps) if r is not None else -1 for r in ranks]
    return rank_log(folder, steps.index(min(steps)))


def _tail(*paths: Path) -> str:
    """The last lines of the first log that has any."""
    return next(("\n".join(lines) for path in paths if (lines := last_lines(path, LOG_LINES))), "")


@contextlib.contextmanager
def _clean_shared_memory() -> Iterator[None]:
    """Remove from /dev/shm what ranks have left there meanwhile, and nothing that was there before."""
    before = set(SHARED_MEMORY.glob(SHARED_MEMORY_NAMES))
    try:
        yield
    finally:
        for path in set(SHARED_MEMORY.glob(SHARED_MEMORY_NAMES)) - before:
            with contextlib.suppress(OSError):
                path.unlink()
