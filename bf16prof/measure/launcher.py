"""Start the ranks of one case with torchrun, in a session of their own; wait; end them all; say how it ended.

torchrun runs inside a small process of ours (`measure/torchrun.py`) that dies with bf16prof and writes which rank failed how into a file;
nothing is parsed from what anybody prints. Each worker dies with torchrun. So whatever happens to bf16prof - Ctrl-C, SIGTERM, SIGKILL -
no process of its own outlives it.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bf16prof.files import last_lines
from bf16prof.measure.results import RankResult, load_rank
from bf16prof.processes import child_environment, started, threads_per_rank
from bf16prof.runs import FAILURES, LAUNCHER_LOG, SPEC, Status, rank_log

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


def launch(folder: Path, world_size: int, timeout_s: float, on_progress: Callable[[RankResult], None]) -> Outcome:
    """Run the case whose `SPEC` lies in the folder on that many ranks of this machine.

    `on_progress` gets rank 0's result whenever it has changed. On KeyboardInterrupt the ranks are ended before it is raised again.
    """
    with _clean_shared_memory(), started(_command(folder, world_size), folder / LAUNCHER_LOG, _environment(world_size)) as process:
        finished = _wait(process, folder, time.monotonic() + timeout_s, on_progress)
    ranks = tuple(load_rank(folder, rank) for rank in range(world_size))
    if not finished:
        return Outcome(
            Status.TIMEOUT, f"not finished after {timeout_s:g} s: all ranks were ended", _tail(_slowest_log(folder, ranks)), ranks
        )
    return _outcome(folder, process.returncode, ranks)


def _command(folder: Path, world_size: int) -> list[str]:
    return [
        sys.executable, "-m", "bf16prof.measure.torchrun", str(folder / FAILURES),
        "--standalone", "--nproc-per-node", str(world_size), "--max-restarts", "0",
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
        result = load_rank(folder, 0)
        if result is not None and result != seen:
            on_progress(result)
            seen = result
    return True


def _outcome(folder: Path, code: int, ranks: tuple[RankResult | None, ...]) -> Outcome:
    from bf16prof.measure.torchrun import load_failures

    failures = load_failures(folder / FAILURES)
    cause = next((r for r in ranks if r is not None and r.status in (Status.OOM, Status.REFUSED)), None)
    if cause is not None:  # whichever rank failed first
        return Outcome(cause.status, f"rank {cause.rank}: {cause.message}", _tail(rank_log(folder, cause.rank)), ranks)
    if failures:
        first = failures[0]
        result = ranks[first.rank] if first.rank < len(ranks) else None
        reason = result.message if result is not None and result.message else first.reason
        return Outcome(Status.FAILED, f"rank {first.rank}: {reason}", _tail(rank_log(folder, first.rank), folder / LAUNCHER_LOG), ranks)
    if code != 0:
        return Outcome(Status.FAILED, f"torchrun ended with {_exit(code)}", _tail(folder / LAUNCHER_LOG), ranks)
    missing = [rank for rank, result in enumerate(ranks) if result is None or result.status is not Status.FINISHED]
    if missing:
        return Outcome(Status.FAILED, f"no complete result from rank {', '.join(map(str, missing))}", _tail(folder / LAUNCHER_LOG), ranks)
    return Outcome(Status.FINISHED, "", "", ranks)


def _exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


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
