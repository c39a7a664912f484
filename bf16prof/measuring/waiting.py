"""How the nodes of a case wait for each other, and how agents end with whoever waits for them:
through files in the folder of the case.

ssh, pdsh and srun differ in what becomes of a remote process when the local end dies. Files do not;
clocks of several hosts are not compared either: what counts is whether a file has changed while
this process looked.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bf16prof.errors import InputError, RunFailed
from bf16prof.measuring.nodes import load_node
from bf16prof.runs import ALIVE, STOP

LOOK_S = 0.5
SILENT_S = 120.0
"""So long nothing may change; file systems that hosts share show a change after up to a minute
(acregmax, nfs(5))."""
MEETING_S = 900.0
"""How long nodes wait for the first one, which may be compiling."""


HEARTBEAT_S = 5.0


@contextlib.contextmanager
def heartbeat(run: Path) -> Iterator[None]:
    """Count up in the folder of a run every few seconds while the context lasts. A full disk does
    not matter."""
    over = threading.Event()

    def beat() -> None:
        for count in itertools.count():
            with contextlib.suppress(OSError):
                (run / ALIVE).write_text(str(count), encoding="ascii")
            if over.wait(HEARTBEAT_S):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            (run / ALIVE).unlink(missing_ok=True)


class Silence:
    """For how long something has not changed, by this process's own clock."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since = time.monotonic()

    def seconds(self, now: object) -> float:
        """Seconds since it last was something else."""
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        return time.monotonic() - self._since


def last_beat(run: Path) -> bytes:
    """What stands in the folder of a run whose process lives."""
    try:
        return (run / ALIVE).read_bytes()
    except OSError:
        return b""


def end_when_alone(folder: Path, *, while_stdin: bool) -> None:
    """Let this process end like by SIGTERM, in the background, when it is told to, when nobody
    waits for it any more, or with stdin."""
    threading.Thread(target=_watch_folder, args=(folder,), daemon=True).start()
    if while_stdin:
        threading.Thread(target=_watch_stdin, daemon=True).start()


def _watch_folder(folder: Path) -> None:
    silence = Silence()
    while not (folder / STOP).exists():
        if silence.seconds(last_beat(folder.parent)) > SILENT_S or not folder.exists():
            break
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _watch_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # a buffered read would hold a lock when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """A port that is free on this host now."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def port_of_first_node(folder: Path) -> int:
    """The port that the first node has chosen, when it has. Raises `RunFailed` if it does not."""
    deadline = time.monotonic() + MEETING_S
    while time.monotonic() < deadline:
        with contextlib.suppress(InputError):
            found = load_node(folder, 0)
            if found is not None and found.port is not None:
                return found.port
            if found is not None and found.code is not None:
                raise RunFailed(f"{found.name} has ended")
        time.sleep(LOOK_S)
    raise RunFailed(f"node 0 did not say in {MEETING_S:g} s where to meet")
