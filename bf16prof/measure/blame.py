"""Which rank was the first to go wrong, and how: by what ranks wrote, by exit codes and signals, in the order of time."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.measure.exits import RankExit
from bf16prof.measure.results import RankResult
from bf16prof.runs import Status

STOPPED = (Status.FAILED, Status.OOM, Status.REFUSED, Status.INTERRUPTED)
"""What a rank writes of itself when something was raised in it."""

KERNEL = "killed by the kernel, for there was no memory left (SIGKILL)"


@dataclass(frozen=True)
class Cause:
    """Why a case failed: the rank that went wrong first, its status, one line, and when (infinity: nobody saw)."""

    rank: int
    status: Status
    message: str
    at: float
    code: int | None

    @property
    def order(self) -> tuple[float, bool, bool, bool, int]:
        """The first in time comes first. Where that is unknown: what only one rank can have, then signals; what torchrun ended, last."""
        killed = self.code is not None and self.code < 0
        by_torchrun = self.code == -signal.SIGTERM
        return self.at, self.status is Status.FAILED, by_torchrun, not killed, self.rank


def blame(exits: Mapping[int, RankExit], ranks: Sequence[RankResult | None], *, by_kernel: bool) -> Cause | None:
    """The first cause; `None` when no rank is known to have gone wrong. `by_kernel`: the kernel has killed for lack of memory meanwhile."""
    causes = [cause for rank, result in enumerate(ranks) if (cause := _cause(rank, exits.get(rank), result, by_kernel))]
    return min(causes, key=lambda cause: cause.order, default=None)


def _cause(rank: int, end: RankExit | None, result: RankResult | None, by_kernel: bool) -> Cause | None:
    """What went wrong in one rank; nothing in one that finished, or that still ran when all were ended."""
    stopped_at = result.stopped_at if result is not None else None
    at = min((time for time in (stopped_at, end.at if end else None) if time is not None), default=math.inf)
    code = end.code if end else None
    if result is not None and result.status in STOPPED:
        status = result.status if result.status in (Status.OOM, Status.REFUSED) else Status.FAILED
        return Cause(rank, status, result.message, at, None)
    if end is None or (end.code == 0 and result is not None and result.status is Status.FINISHED):
        return None
    if by_kernel and end.code == -signal.SIGKILL:
        return Cause(rank, Status.OOM, KERNEL, at, code)
    return Cause(rank, Status.FAILED, f"{end.reason} before it had finished" if end.code == 0 else end.reason, at, code)
