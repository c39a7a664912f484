"""The agents of several nodes while one case runs: started, waited for through what they report,
and ended together."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.files import NotWritten, write_text
from bf16prof.measuring.commands import Command
from bf16prof.measuring.nodes import NodeReport, load_node
from bf16prof.measuring.places import Layout
from bf16prof.measuring.surroundings import launcher_environment
from bf16prof.measuring.waiting import SILENT_S, Silence
from bf16prof.processes import started
from bf16prof.runs import STOP, node_log

FAILING_S = 5.0
"""When one node has failed, the others get so long to fail by themselves and to write why."""
ENDING_S = 10.0
"""Agents that were told to end get so long to end their ranks."""
PREPARING_S = 900.0
"""What a node may take to compile, once it has reported."""


class Fleet:
    """What is known of the agents of a case. `look` asks again."""

    def __init__(self, folder: Path, layout: Layout, processes: Sequence[tuple[Command, subprocess.Popen[bytes]]]) -> None:
        self._folder, self._layout, self._processes = folder, layout, processes
        self._silence = [Silence() for _ in layout.hosts]
        self._failed_at: float | None = None
        self.reports: list[NodeReport | None] = [None] * len(layout.hosts)
        self.problems: dict[int, str] = {}
        """Of nodes that can say nothing any more: why, in a line."""

    def look(self) -> None:
        """Read what nodes report, and see which are lost."""
        for node in range(len(self.reports)):
            with contextlib.suppress(InputError):  # half a file is none yet
                self.reports[node] = load_node(self._folder, node) or self.reports[node]
        for node in range(len(self.reports)):
            if node not in self.problems and (problem := self._problem(node)):
                self.problems[node] = problem
        if self._failed_at is None and (self.problems or self.code):
            self._failed_at = time.monotonic()

    def _problem(self, node: int) -> str:
        report = self.reports[node]
        if report is not None and report.code is not None:
            return f"{report.name}: {report.message}" if report.message else ""
        beat = report.beat if report is not None else -1
        quiet = self._silence[node].seconds(beat)
        if report is not None and quiet > SILENT_S:
            return f"{report.name} has not said anything for {SILENT_S:g} s"
        code = next((process.poll() for command, process in self._processes if node in command.nodes), None)
        if code is None or quiet < FAILING_S:
            return ""
        how = f"what started it ended with exit code {code}"
        return f"{report.name} is gone: {how}" if report is not None else f"{self.name(node)} never reported: {how}"

    def name(self, node: int) -> str:
        """`node 1 (hostb)`; without the host where nobody knows it."""
        report, host = self.reports[node], self._layout.hosts[node].name
        return report.name if report is not None else f"node {node} ({host})" if host else f"node {node}"

    @property
    def missing(self) -> list[str]:
        """Nodes that have not reported and may yet, by name."""
        return [self.name(node) for node, report in enumerate(self.reports) if report is None and node not in self.problems]

    @property
    def mute(self) -> list[str]:
        """Nodes that have reported, and have not said how they ended, as far as nobody knows more,
        by name."""
        return [r.name for node, r in enumerate(self.reports) if r is not None and r.code is None and node not in self.problems]

    @property
    def code(self) -> int:
        """The first exit code of an agent that is not 0."""
        return next((report.code for report in self.reports if report is not None and report.code), 0)

    @property
    def is_ready(self) -> bool:
        """Whether ranks are about to start on all nodes, or have."""
        return all(report is not None and report.is_ready for report in self.reports)

    @property
    def is_over(self) -> bool:
        """Whether all nodes have ended, or one has failed and the others had time to."""
        if all(node in self.problems or (report is not None and report.code is not None) for node, report in enumerate(self.reports)):
            return True
        return self._failed_at is not None and time.monotonic() - self._failed_at > FAILING_S

    def log(self) -> Path:
        """The log of the node that has a problem, else of the first one that did not report."""
        suspects = [*self.problems, *(node for node, report in enumerate(self.reports) if report is None), 0]
        return node_log(self._folder, suspects[0])

    def end(self) -> None:
        """Tell all agents to end unless they have, and wait until they say so."""
        if not self.mute and not self.missing:
            return
        with contextlib.suppress(NotWritten):
            write_text(self._folder / STOP, "")
        deadline = time.monotonic() + ENDING_S
        while time.monotonic() < deadline and (self.mute or any(process.poll() is None for _, process in self._processes)):
            time.sleep(0.1)
            self.look()


@contextlib.contextmanager
def fleet(folder: Path, layout: Layout, commands: Sequence[Command]) -> Iterator[Fleet]:
    """The agents of a case, started by these commands; at the end of the block all of them are told
    to end."""
    layout.save(folder)
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            log, stdin = node_log(folder, command.nodes[0]), subprocess.PIPE if command.holds_stdin else subprocess.DEVNULL
            processes.append((command, stack.enter_context(started(command.words, log, launcher_environment(), stdin=stdin))))
        found = Fleet(folder, layout, processes)
        try:
            yield found
        finally:
            found.end()
