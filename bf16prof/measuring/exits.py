"""Which rank ended when, and how: seen by the process that started them, at the moment it happens.

torchrun looks at its ranks ten times a second, tells whole seconds, and knows nothing of a rank
that left with exit code 0 too early. When one rank is gone the others fail within milliseconds. So
the kernel is asked: a file descriptor of each process becomes readable at its end
(`pidfd_open(2)`), and its exit status can be read without burying it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.files import write_json
from bf16prof.processes import signal_name
from bf16prof.runs import read
from bf16prof.vocabulary import STRICT

LOOK_S = 0.02
"""How often ranks are looked for that have not been found yet."""


@dataclass(frozen=True)
class RankExit:
    """How a rank ended: its exit code, negative for the signal that killed it, and when, in seconds
    of the system's monotonic clock.

    The clock is one for all processes of a machine, and does not jump. `None`: when it ended nobody
    saw.
    """

    __pydantic_config__ = STRICT

    rank: int
    code: int
    at: float | None = None

    @property
    def reason(self) -> str:
        """The exit code or the name of the signal."""
        return f"killed by {signal_name(-self.code)}" if self.code < 0 else f"left with exit code {self.code}"


@dataclass(frozen=True)
class _Exits:
    __pydantic_config__ = STRICT

    exits: tuple[RankExit, ...]
    schema_version: int = SCHEMA_VERSION


def save_exits(path: Path, exits: dict[int, RankExit]) -> None:
    """Write what is known, by rank."""
    write_json(path, _Exits(tuple(exits[rank] for rank in sorted(exits))))


def load_exits(path: Path) -> dict[int, RankExit]:
    """What is known, by rank; nothing where nothing was written. Raises `InputError` for a file
    that cannot be read."""
    if not path.exists():
        return {}
    found: _Exits = read(path, _Exits)
    return {each.rank: each for each in found.exits}


class ExitWatch:
    """Watches the children of this process that are ranks, in a thread, and tells of each that
    ends."""

    def __init__(self, ranks: int, tell: Callable[[RankExit], None]) -> None:
        self._missing, self._tell = ranks, tell
        self._known: dict[int, int] = {}
        self._poll = select.poll()

    def start(self) -> None:
        """Begin; the thread ends with this process. Where the kernel cannot be asked there is none,
        and torchrun's word is all there is."""
        try:
            os.close(os.pidfd_open(os.getpid()))
        except (AttributeError, OSError):
            return
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self._missing or self._known:
            if self._missing:
                self._look()
            for descriptor, _event in self._poll.poll(LOOK_S * 1000 if self._missing else None):
                self._over(descriptor, time.monotonic())

    def _look(self) -> None:
        """Find ranks that have started: children whose environment names their rank, which it does
        once they run their own program."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error, OSError, KeyError, ValueError):
                rank = int(child.environ()["RANK"])
                if rank not in self._known.values():
                    descriptor = os.pidfd_open(child.pid)
                    self._known[descriptor] = rank
                    self._poll.register(descriptor, select.POLLIN)
                    self._missing -= 1

    def _over(self, descriptor: int, at: float) -> None:
        rank = self._known.pop(descriptor)
        self._poll.unregister(descriptor)
        code = 0  # if torchrun has buried it already, it will say what else it was
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)
            if found is not None:
                code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        os.close(descriptor)
        self._tell(RankExit(rank, code, at))
