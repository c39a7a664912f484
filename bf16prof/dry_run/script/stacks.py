"""Where a process stands that does not come to an end: it writes its stack into a file when it is asked to, whatever it is doing."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from pathlib import Path

from bf16prof.processes import STACK_FRAME
from bf16prof.scripts.main import is_own

ASKING = signal.SIGUSR2
ANSWER_S = 2.0
STACK = "stack"
"""The file in the folder of a dry run."""

_PHASES = ("forward", "backward", "step")
_ENGINE = ("deepspeed/runtime/engine.py", "deepspeed/runtime/pipe/engine.py")


def answer_into(file: Path) -> None:
    """From now on this process writes its stack there when it is asked."""
    stream = file.open("w", encoding="utf-8")  # faulthandler keeps it
    faulthandler.register(ASKING, stream, all_threads=False)


def where(pid: int, file: Path) -> str:
    """Ask: `train.py:12 in backward`, the innermost line of the user's own code and the engine's phase; empty where nobody answers."""
    if not file.exists():
        return ""
    answered = file.stat().st_size  # what it wrote when it was asked before
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, ASKING)
    deadline = time.monotonic() + ANSWER_S
    while not (found := place(file.read_bytes()[answered:].decode(errors="replace"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def place(stack: str) -> str:
    """What `where` says of a stack as faulthandler writes it, the innermost frame first; empty without one."""
    frames = [found.group("file", "line", "name") for line in stack.splitlines() if (found := STACK_FRAME.fullmatch(line))]
    if not frames:
        return ""
    path, line, _ = next((frame for frame in frames if is_own(frame[0])), frames[0])
    phase = next((name for file, _, name in frames if file.endswith(_ENGINE) and name in _PHASES), "")
    return f"{Path(path).name}:{line}{f' in {phase}' if phase else ''}"
