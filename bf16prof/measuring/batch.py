"""A measurement as a batch job of Slurm: the same command is written into a script, submitted,
waited for, and cancelled where it is interrupted.

Inside the job the command finds its allocation and starts one agent on each node (`places.py`).
Nothing is copied: the run directory and the environment have to be on a file system that nodes
share, as for every measurement on several nodes.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bf16prof.errors import InputError, RunFailed
from bf16prof.files import write_text

POLL_S = 0.5
CANCEL_S = 60.0
"""What Slurm gets to end a job that is cancelled: its own grace (KillWait) is half of that."""


@dataclass(frozen=True)
class BatchJob:
    """One job: what it runs, on how many whole nodes, and the run directory, beside which its
    script and its output lie."""

    words: Sequence[str]
    nodes: int
    folder: Path

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.folder.with_name(f"{self.folder.name}.sbatch")

    @property
    def output(self) -> Path:
        """What the job prints."""
        return self.folder.with_name(f"{self.folder.name}.out")

    @property
    def errors(self) -> Path:
        """What it says besides."""
        return self.folder.with_name(f"{self.folder.name}.err")

    def write(self) -> None:
        """Write the script. Options that are not in it stand in Slurm's own variables,
        `SBATCH_PARTITION` and the like."""
        options = {"job-name": "bf16prof", "nodes": self.nodes, "output": self.output, "error": self.errors}
        lines = ["#!/bin/sh", *(f"#SBATCH --{name}={value}" for name, value in options.items()), "#SBATCH --exclusive"]
        write_text(self.script, "\n".join([*lines, f"exec {shlex.join(self.words)}", ""]))


def run(batch: BatchJob, say: Callable[[str], None]) -> int:
    """Submit it, show what it prints as it comes, and wait; its exit code. However the wait ends,
    the job does not outlive it."""
    if shutil.which("sbatch") is None:
        raise InputError("--launcher slurm: there is no sbatch here", hint="run it where jobs are submitted")
    if any(character in str(batch.folder.resolve()) for character in " %\\"):
        raise InputError(f"--output-dir {batch.folder}: Slurm reads %, \\ and spaces in file names otherwise")
    batch.write()
    for path in (batch.output, batch.errors):
        path.unlink(missing_ok=True)
    with _submitted(batch) as (number, process):
        say(f"job {number}: squeue -j {number}; {batch.script} is its script")
        shown = [_Tail(batch.output, sys.stdout), _Tail(batch.errors, sys.stderr)]
        while process.poll() is None:
            time.sleep(POLL_S)
            for tail in shown:
                tail.show()
        for tail in shown:
            tail.show()
        return process.returncode


@contextlib.contextmanager
def _submitted(batch: BatchJob) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The number of the job, and sbatch, which ends with it and has its exit code."""
    words = ["sbatch", "--wait", "--parsable", str(batch.script)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stderr is not None
    number = process.stdout.readline().strip().partition(";")[0]
    if not number:
        raise RunFailed(f"sbatch: {' '.join(process.stderr.read().split()) or 'it said nothing'}", hint=f"it was given {batch.script}")
    try:
        yield number, process
    finally:
        if process.poll() is None:
            subprocess.run(["scancel", number], check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CANCEL_S)
            process.kill()


class _Tail:
    """Shows what is added to a file."""

    def __init__(self, path: Path, stream: IO[str]) -> None:
        self._path, self._stream, self._at = path, stream, 0

    def show(self) -> None:
        """What is new."""
        if not self._path.exists():
            return
        with self._path.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._at)
            text = file.read()
            self._at = file.tell()
        self._stream.write(text)
        self._stream.flush()
