"""Which rank was the first to go wrong, and how: by what ranks wrote, by exit codes and signals, in
the order of time."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.measuring.exits import RankExit
from bf16prof.measuring.results import RankResult
from bf16prof.runs import Status

STOPPED = (Status.FAILED, Status.OOM, Status.REFUSED, Status.INTERRUPTED)
"""What a rank writes of itself when something was raised in it."""

KERNEL = "killed by the kernel, for there was no memory left (SIGKILL)"


@dataclass(frozen=True)
class Cause:
    """Why a case failed: the rank that went wrong first, its status, one line, and when (infinity:
    nobody saw).

    `is_consequence`: the rank has only noticed that another is gone, or torchrun has ended it
    because another had failed.
    """

    rank: int
    status: Status
    message: str
    at: float
    is_consequence: bool
    is_killed: bool

    @property
    def order(self) -> tuple[bool, float, bool, bool, int]:
        """What is no consequence comes first, then by time. Where that is unknown: what only one
        rank can have, then signals.

        Time alone is not enough: connections are closed before a process is gone, and others may
        say so before anybody can see it end.
        """
        return self.is_consequence, self.at, self.status is Status.FAILED, not self.is_killed, self.rank


def blame(exits: Mapping[int, RankExit], ranks: Sequence[RankResult | None], *, by_kernel: bool) -> Cause | None:
    """The first cause; `None` when no rank is known to have gone wrong. `by_kernel`: the kernel has
    killed for lack of memory meanwhile."""
    causes = [cause for rank, result in enumerate(ranks) if (cause := _cause(rank, exits, result, by_kernel))]
    return min(causes, key=lambda cause: cause.order, default=None)


def _cause(rank: int, exits: Mapping[int, RankExit], result: RankResult | None, by_kernel: bool) -> Cause | None:
    """What went wrong in one rank; nothing in one that finished, or that still ran when all were
    ended."""
    end = exits.get(rank)
    seen_at = end.at if end is not None else None
    if result is not None and result.status in STOPPED:
        status = result.status if result.status in (Status.OOM, Status.REFUSED) else Status.FAILED
        at = min((time for time in (result.stopped_at, seen_at) if time is not None), default=math.inf)
        return Cause(rank, status, result.message, at, result.noticed, is_killed=False)
    if end is None or (end.code == 0 and result is not None and result.status is Status.FINISHED):
        return None
    status, message = Status.FAILED, f"{end.reason} before it had finished" if end.code == 0 else end.reason
    if by_kernel and end.code == -signal.SIGKILL:
        status, message = Status.OOM, KERNEL
    return Cause(rank, status, message, math.inf if seen_at is None else seen_at, _by_torchrun(end, exits), end.code < 0)


def _by_torchrun(end: RankExit, exits: Mapping[int, RankExit]) -> bool:
    """Whether torchrun ended a rank: by SIGTERM, and after another had ended (if that is unknown,
    always)."""
    others = (each for each in exits.values() if each.rank != end.rank)
    return end.code == -signal.SIGTERM and (end.at is None or any(other.at is not None and other.at < end.at for other in others))
