"""Where a rank is, for whoever ends it because it hangs: a small file, written anew at every phase,
and the stack that the rank hangs in.

A phase is one write of a line, which takes microseconds and no memory: it may be inside of a timed
step. The stack is written by a thread of `faulthandler`, which needs no Python to run, a moment
before the time is over. Real ranks and dry runs of scripts say it alike.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.files import LARGEST_SETTINGS, read_up_to
from bf16prof.runs import where_file
from bf16prof.scripts.main import is_own
from bf16prof.vocabulary import Phase

DEADLINE = "BF16PROF_DEADLINE"
"""The variable that says when all ranks will be ended, in seconds of the system's monotonic
clock."""

EARLIER_S = 1.0
"""So long before, a rank writes its stack."""

WIDTH = 80
"""Bytes of the line that is written anew; the stack comes after it."""

STACK_LINES = 12
_FRAME = re.compile(r'\s*File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')
"""A line of a stack as `faulthandler` writes it."""
_WAITING = re.compile(r"/torch/distributed/|/deepspeed/comm/")
_THREAD = "most recent call first"
_MOST_NAMED = 4


def deadline() -> float | None:
    """When this rank will be ended; `None` where nobody said. The variable is gone then: what a
    script starts is not meant."""
    said = os.environ.pop(DEADLINE, None)
    return float(said) if said else None


class Whereabouts:
    """Those of this process as a rank. A file that cannot be written does not matter.

    `deadline`: when the rank will be ended, by the monotonic clock; none where nobody will.
    """

    def __init__(self, folder: Path, rank: int, deadline: float | None) -> None:
        self._count, self._descriptor, self._pid = 0, -1, os.getpid()
        with contextlib.suppress(OSError):
            self._descriptor = os.open(where_file(folder, rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.say("starting")
        left = math.inf if deadline is None else deadline - EARLIER_S - time.monotonic()
        if self._descriptor >= 0 and left < threading.TIMEOUT_MAX:  # a script may take as long as it likes
            os.lseek(self._descriptor, WIDTH, os.SEEK_SET)
            faulthandler.dump_traceback_later(max(0.1, left), file=self._descriptor)

    def say(self, what: str) -> None:
        """The rank is there now: a phrase that stands after "rank 3 was". A process that it has
        forked says nothing."""
        if os.getpid() != self._pid:
            return
        line = f"{self._count} {what}".encode()[: WIDTH - 1].ljust(WIDTH - 1) + b"\n"
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, line, 0)
        self._count += 1

    def enter(self, phase: Phase | None, step: int) -> None:
        """A phase of that step begins; `None`: none does."""
        words = {None: f"between steps, after step {step}", Phase.INIT: "in init", Phase.STEP: f"in the optimizer's part of step {step}"}
        words[Phase.EVAL] = f"in the evaluation after {step} steps"
        self.say(words.get(phase, f"in {phase} of step {step}"))


@dataclass(frozen=True)
class Where:
    """Where a rank was: how many phases it had begun, in words, and its main thread's frames, the
    innermost first, if it could say.

    `is_waiting`: one of its threads was in a collective operation, which waits for other ranks.
    """

    rank: int
    count: int
    what: str
    stack: tuple[str, ...] = ()
    is_waiting: bool = False

    @property
    def place(self) -> str:
        """The innermost line of the user's own code, or the innermost of all; empty without a
        stack."""
        frames = [found for line in self.stack if (found := _FRAME.fullmatch(line))]
        found = next((frame for frame in frames if is_own(frame["file"])), frames[0] if frames else None)
        return f" ({Path(found['file']).name}, line {found['line']} in {found['name']})" if found else ""


def read_where(folder: Path, rank: int) -> Where:
    """Where a rank was last. One that has written nothing is not there yet."""
    try:
        text = read_up_to(LARGEST_SETTINGS, where_file(folder, rank)).decode(errors="replace")
    except InputError:
        text = ""
    count, _, what = text[:WIDTH].strip().partition(" ")
    if not count.isdecimal():
        return Where(rank, -1, "not there yet")
    threads = text[WIDTH:].split("\n\n")
    frames = [line for line in threads[-1].splitlines() if _FRAME.fullmatch(line)] if _THREAD in threads[-1] else []
    return Where(rank, int(count), what, tuple(frames), _WAITING.search(text[WIDTH:]) is not None)


def hanging(folder: Path, ranks: Sequence[int]) -> list[Where]:
    """Those of these ranks that the others wait for: who is in no collective operation, and of
    these who has come least far."""
    found = [read_where(folder, rank) for rank in ranks]
    least = min(((each.is_waiting, each.count) for each in found), default=None)
    return [each for each in found if (each.is_waiting, each.count) == least]


def where_they_were(found: Sequence[Where]) -> str:
    """Who hangs and where, in words; empty if nobody does."""
    if not found:
        return ""
    first = found[0]
    if len(found) == 1:
        return f"rank {first.rank} was {first.what}{first.place}"
    named, more = [str(each.rank) for each in found[:_MOST_NAMED]], len(found) - _MOST_NAMED
    names = f"{', '.join(named)} and {more} more" if more > 0 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"ranks {names} were {first.what}"
