"""`measure` on a node that is not the first: it does what the first node's run directory says,
until that run is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bf16prof.errors import InputError, RunFailed
from bf16prof.measuring.commands import agent_command
from bf16prof.measuring.places import Layout
from bf16prof.measuring.surroundings import launcher_environment
from bf16prof.measuring.waiting import LOOK_S, SILENT_S, Silence, last_beat
from bf16prof.processes import started
from bf16prof.runs import LAYOUT, MANIFEST, SCRIPT, SCRIPT_FOLDER, Manifest, Status, node_file, node_log, read


def follow(folder: Path, node: int, timeout_s: float, say: Callable[[str], None]) -> Status:
    """Run this node's ranks of each case that begins; the status of the run when it is over.

    Raises `RunFailed` when no run begins in that time, and when the first node is gone.
    """
    manifest = _running(folder, node, timeout_s)
    say(f"node {node}: following the run of {manifest.created} in {folder}")
    done: set[tuple[str, str]] = set()
    silence = Silence()
    while manifest.status is Status.RUNNING:
        case = next((status.case.label for status in manifest.cases if status.status is Status.RUNNING), None)
        case = SCRIPT_FOLDER if (folder / SCRIPT_FOLDER / SCRIPT).exists() else case
        if case is not None and (manifest.created, case) not in done and _is_for(folder / case, node):
            done.add((manifest.created, case))
            say(f"node {node}: {case}")
            _run(folder / case, node)
        if silence.seconds(last_beat(folder)) > SILENT_S:
            raise RunFailed(f"node 0 has not said anything for {SILENT_S:g} s")
        time.sleep(LOOK_S)
        manifest = _manifest(folder) or manifest
    return manifest.status


def _running(folder: Path, node: int, timeout_s: float) -> Manifest:
    """The manifest of a run that goes on. An old one in the same folder has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        manifest = _manifest(folder)
        if manifest is not None and manifest.status is Status.RUNNING:
            return manifest
        time.sleep(LOOK_S)
    raise RunFailed(
        f"node {node}: no run began in {folder} in {timeout_s:g} s", hint="is node 0 started, and do both see the same --output-dir?"
    )


def _manifest(folder: Path) -> Manifest | None:
    try:
        found: Manifest = read(folder / MANIFEST, Manifest)
    except InputError:
        return None
    return found


def _is_for(folder: Path, node: int) -> bool:
    """Whether the first node waits for this one's ranks: the layout is there, and no report of ours
    yet."""
    if not (folder / LAYOUT).exists() or node_file(folder, node).exists():
        return False
    try:
        layout = Layout.load(folder)
    except InputError:
        return False
    if node >= len(layout.hosts):
        raise InputError(f"--node-rank {node}: the run in {folder.parent} has {len(layout.hosts)} nodes")
    return True


def _run(folder: Path, node: int) -> None:
    with started(agent_command(folder, node), node_log(folder, node), launcher_environment()) as process:
        process.wait()
