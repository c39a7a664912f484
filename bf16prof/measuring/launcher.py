"""Start the ranks of one case with torchrun, in a session of their own; wait; end them all; say how
it ended.

torchrun runs inside a small process of ours (`measuring/agent.py`) that dies with bf16prof and
writes which rank failed how into a file; nothing is parsed from what anybody prints. Each worker
dies with torchrun. So whatever happens to bf16prof - Ctrl-C, SIGTERM, SIGKILL - no process of its
own outlives it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bf16prof.errors import SIGNALLED, InputError
from bf16prof.files import last_lines
from bf16prof.measuring.blame import Cause, blame
from bf16prof.measuring.commands import commands, local_command
from bf16prof.measuring.exits import RankExit, load_exits
from bf16prof.measuring.fleet import PREPARING_S, Fleet, fleet
from bf16prof.measuring.nodes import NodeReport
from bf16prof.measuring.places import Place, Starter
from bf16prof.measuring.results import RankResult, load_rank
from bf16prof.measuring.shared_memory import clean_shared_memory
from bf16prof.measuring.surroundings import rank_environment
from bf16prof.memory_kills import MemoryKills
from bf16prof.processes import signal_name, started
from bf16prof.runs import EXITS, LAUNCHER_LOG, Status, exits_file, rank_log, where_file
from bf16prof.whereabouts import DEADLINE, STACK_LINES, hanging, where_they_were

T = TypeVar("T")
POLL_S = 0.2
LOG_LINES = 15


@dataclass(frozen=True)
class RanksOutcome:
    """How the ranks of one case ended: status, one line for a person, the end of the failing rank's
    log, and what every rank wrote.

    `nodes`: what the nodes reported, where there are several.
    """

    status: Status
    message: str
    log_tail: str
    ranks: tuple[RankResult | None, ...]
    nodes: tuple[NodeReport, ...] = ()


@dataclass(frozen=True)
class _Seen:
    """What lies in the folder of a case: each rank's result, the ends of ranks, and why files among
    them could not be read."""

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

    @classmethod
    def on_nodes(cls, folder: Path, world_size: int, reports: Sequence[NodeReport | None]) -> _Seen:
        """The same of several nodes, all times by the wall clock: monotonic clocks of two hosts
        have nothing in common."""
        own = cls.of(folder, world_size)
        exits: dict[int, RankExit] = {}
        unread = list(own.unread)
        for node, report in enumerate(reports):
            clock = report.clock if report is not None else 0.0
            found = _readable(functools.partial(load_exits, exits_file(folder, node)), unread) or {}
            exits |= {rank: dataclasses.replace(end, at=_later(end.at, clock)) for rank, end in found.items()}
        clocks = {report.node: report.clock for report in reports if report is not None}
        ranks = [rank and dataclasses.replace(rank, stopped_at=_later(rank.stopped_at, clocks.get(rank.node, 0.0))) for rank in own.ranks]
        return cls(tuple(ranks), exits, tuple(unread))


def _later(at: float | None, by: float) -> float | None:
    return None if at is None else at + by


def _readable(load: Callable[[], T], unread: list[str]) -> T | None:
    try:
        return load()
    except InputError as error:
        unread.append(error.message)
        return None


def launch(
    folder: Path, place: Place, world_size: int, timeout_s: float, on_progress: Callable[[RankResult], None], *, is_shown: bool = False
) -> RanksOutcome:
    """Run the case whose `SPEC` lies in the folder on that many ranks there.

    `on_progress` gets rank 0's result whenever it has changed. On KeyboardInterrupt the ranks are
    ended before it is raised again. `is_shown`: what ranks on this machine print goes where this
    process prints.
    """
    try:
        if place.starter is Starter.LOCAL:
            return _launch_here(folder, world_size, timeout_s, on_progress, is_shown=is_shown)
        return _launch_on_nodes(folder, place, world_size, timeout_s, on_progress)
    finally:
        for rank in range(world_size):
            with contextlib.suppress(OSError):
                where_file(folder, rank).unlink(missing_ok=True)


def _launch_here(
    folder: Path, world_size: int, timeout_s: float, on_progress: Callable[[RankResult], None], *, is_shown: bool
) -> RanksOutcome:
    kills = MemoryKills()
    early: _Seen | None = None
    progress = _Progress(folder, on_progress)
    deadline = time.monotonic() + timeout_s
    with clean_shared_memory(), _started(folder, world_size, is_shown, deadline) as process:
        if not _wait(lambda: process.poll() is not None, deadline, progress):
            early = _Seen.of(folder, world_size)  # before the others are ended, who then fail as well
    seen = _Seen.of(folder, world_size)
    cause = blame((early or seen).exits, (early or seen).ranks, by_kernel=kills.happened())
    if cause is None and early is not None:
        return _timeout(folder, timeout_s, seen)
    return _outcome(folder, process.returncode, seen, cause)


def _started(folder: Path, world_size: int, is_shown: bool, deadline: float) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    env = {**rank_environment(world_size), DEADLINE: str(deadline)}
    return started(local_command(folder, world_size), None if is_shown else folder / LAUNCHER_LOG, env)


def _timeout(folder: Path, timeout_s: float, seen: _Seen) -> RanksOutcome:
    """Who hangs, by what ranks have written of their whereabouts, with its log and its stack."""
    unfinished = [rank for rank, result in enumerate(seen.ranks) if result is None or result.status is not Status.FINISHED]
    found = hanging(folder, unfinished)
    message = f"not finished after {timeout_s:g} s: {where_they_were(found) or 'all ranks had finished, and did not leave'}"
    lines = [line for each in found[:1] for line in (_tail(rank_log(folder, each.rank)), *each.stack[:STACK_LINES]) if line]
    return RanksOutcome(Status.TIMEOUT, message, "\n".join(lines), seen.ranks)


def _launch_on_nodes(
    folder: Path, place: Place, world_size: int, timeout_s: float, on_progress: Callable[[RankResult], None]
) -> RanksOutcome:
    """The same on several nodes, each of which has an agent. The time runs from when all are ready;
    before, they may compile."""
    layout = place.layout(world_size)
    progress = _Progress(folder, on_progress)
    with clean_shared_memory(), fleet(folder, layout, commands(place.starter, folder, layout)) as agents:

        def is_over() -> bool:
            agents.look()
            return agents.is_over

        begin = time.monotonic()
        _wait(lambda: is_over() or not agents.missing, begin + timeout_s, progress)
        if not agents.missing:
            _wait(lambda: is_over() or agents.is_ready, begin + timeout_s + PREPARING_S, progress)
        in_time = agents.is_over or (agents.is_ready and _wait(is_over, time.monotonic() + timeout_s, progress))
        early = _Seen.on_nodes(folder, world_size, agents.reports)
    agents.look()
    seen = _Seen.on_nodes(folder, world_size, agents.reports)
    outcome = _outcome_of_nodes(folder, agents, early, seen) or (
        _outcome(folder, agents.code, seen, None) if in_time else _timeout(folder, timeout_s, seen)
    )
    return dataclasses.replace(outcome, nodes=tuple(report for report in agents.reports if report is not None))


def _outcome_of_nodes(folder: Path, agents: Fleet, early: _Seen, seen: _Seen) -> RanksOutcome | None:
    """What went wrong on several nodes, if anything is known. A node that is gone is the cause of
    what ranks only noticed."""
    cause = blame(early.exits, early.ranks, by_kernel=False)
    if cause is not None and not cause.is_consequence:
        return _outcome(folder, 1, seen, cause)
    problems = [*agents.problems.values()]
    problems += [f"{name} never reported: is bf16prof running there, and is {folder.parent} shared with it?" for name in agents.missing]
    problems += [f"{name} is gone without a word" for name in agents.mute]
    if problems:
        noticed = f"; rank {cause.rank}: {cause.message}" if cause is not None else ""
        return RanksOutcome(Status.FAILED, "; ".join(problems) + noticed, _tail(agents.log(), *_logs(folder, cause)), seen.ranks)
    return None if cause is None else _outcome(folder, agents.code, seen, cause)


def _logs(folder: Path, cause: Cause | None) -> list[Path]:
    return [] if cause is None else [rank_log(folder, cause.rank)]


def _outcome(folder: Path, code: int, seen: _Seen, cause: Cause | None) -> RanksOutcome:
    """How a case ended whose ranks have ended by themselves, or the cause why they had to be."""
    if cause is not None:
        log = _tail(rank_log(folder, cause.rank), folder / LAUNCHER_LOG)
        return RanksOutcome(cause.status, f"rank {cause.rank}: {cause.message}", log, seen.ranks)
    missing = [rank for rank, result in enumerate(seen.ranks) if result is None or result.status is not Status.FINISHED]
    if code == 0 and not missing:
        return RanksOutcome(Status.FINISHED, "", "", seen.ranks)
    what = f"torchrun ended with {_exit(code)}" if code else f"no complete result from rank {', '.join(map(str, missing))}"
    return RanksOutcome(Status.FAILED, "; ".join([what, *seen.unread]), _tail(folder / LAUNCHER_LOG), seen.ranks)


class _Progress:
    """Tells of rank 0's result whenever it has changed."""

    def __init__(self, folder: Path, tell: Callable[[RankResult], None]) -> None:
        self._folder, self._tell = folder, tell
        self._seen: RankResult | None = None

    def look(self) -> None:
        result = _readable(functools.partial(load_rank, self._folder, 0), [])
        if result is not None and result != self._seen:
            self._tell(result)
            self._seen = result


def _wait(is_over: Callable[[], bool], deadline: float, progress: _Progress) -> bool:
    """Wait until it is over; False when the deadline comes first."""
    while not is_over():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
        progress.look()
    return True


def _exit(code: int) -> str:
    number = -code if code < 0 else code - SIGNALLED
    return f"signal {signal_name(number)}" if number > 0 else f"exit code {code}"


def _tail(*paths: Path) -> str:
    """The last lines of the first log that has any."""
    return next(("\n".join(lines) for path in paths if (lines := last_lines(path, LOG_LINES))), "")
