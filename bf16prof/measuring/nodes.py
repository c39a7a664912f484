"""What an agent says of its node while a case runs: one file per node, written again and again, so
that silence can be told from work."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.files import write_json
from bf16prof.runs import node_file, read
from bf16prof.vocabulary import STRICT, Size

BEAT_S = 2.0
"""An agent reports at least this often."""


@dataclass(frozen=True)
class NodeReport:
    """One node of a case.

    * `host`, `pid` of the agent, `ranks` on this node, `hardware` as in a manifest; `port`: where
      nodes meet, if it is this one's to say.
    * `is_ready`: extensions are compiled, ranks are about to start. `beat` counts up while the
      agent lives.
    * `clock`: seconds from the system's monotonic clock to the wall clock, by which ends on several
      nodes are put in order.
    * `code`: how the agent ended (`None`: not yet); `message`: why it could not start.
    """

    __pydantic_config__ = STRICT

    node: Size
    host: str
    pid: int
    ranks: Size
    hardware: dict[str, str] = field(default_factory=dict)
    port: Size | None = None
    is_ready: bool = False
    beat: Size = 0
    clock: float = 0.0
    code: int | None = None
    message: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def name(self) -> str:
        """`node 1 (hostb)`."""
        return f"node {self.node} ({self.host})"


def load_node(folder: Path, node: int) -> NodeReport | None:
    """What a node has reported; `None` if nothing. Raises `InputError` for a file that cannot be
    read."""
    path = node_file(folder, node)
    if not path.exists():
        return None
    found: NodeReport = read(path, NodeReport)
    return found


class Reporter:
    """Writes the report of this node when something changes, and every `BEAT_S` seconds from
    `start` on, in a thread."""

    def __init__(self, folder: Path, node: int, ranks: int, hardware: dict[str, str]) -> None:
        self._folder, self._lock, self._over = folder, threading.Lock(), threading.Event()
        self._report = NodeReport(node, socket.gethostname(), os.getpid(), ranks, hardware, clock=time.time() - time.monotonic())
        self.say()

    def say(self, **changes: Any) -> None:
        """Change the report and write it."""
        with self._lock:
            self._report = dataclasses.replace(self._report, **changes, beat=self._report.beat + 1)
            write_json(node_file(self._folder, self._report.node), self._report)

    def start(self) -> None:
        """Begin to beat."""
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self, code: int, message: str = "") -> None:
        """The last word."""
        self._over.set()
        self.say(code=code, message=message)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self.say()
