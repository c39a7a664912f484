"""Dry-run jobs in processes of their own: DeepSpeed and torch.distributed keep global state, so each job gets a fresh copy of one process
that has imported both. torch-free on this side.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bf16prof.cases import Job, JobFile
from bf16prof.errors import RunFailed
from bf16prof.processes import child_environment, started
from bf16prof.records import MemoryRecord
from bf16prof.runs import load_records, write_json

POLL_S = 0.05


def job_file(folder: Path, index: int) -> Path:
    """Where a job is written."""
    return folder / f"job{index}.json"


def record_file(folder: Path, index: int) -> Path:
    """Where its record appears."""
    return folder / f"record{index}.json"


def simulate(jobs: Sequence[Job], on_done: Callable[[int], None] = lambda _: None) -> list[MemoryRecord]:
    """The records of these jobs, in their order; `on_done` is told how many are done.

    Raises `RunFailed` with the last line of the log when a dry run ends without a record. On KeyboardInterrupt all processes are ended.
    """
    with tempfile.TemporaryDirectory(prefix="bf16prof-") as name:
        folder = Path(name)
        for index, job in enumerate(jobs):
            write_json(job_file(folder, index), JobFile.of(job))
        log = folder / "log"
        command = [sys.executable, "-m", "bf16prof.simulate.worker", str(folder), str(len(jobs))]
        with started(command, log, child_environment()) as process:
            _watch(process, folder, len(jobs), on_done)
        return [_record(folder, index, job, log) for index, job in enumerate(jobs)]


def _watch(process: subprocess.Popen[bytes], folder: Path, count: int, on_done: Callable[[int], None]) -> None:
    done = -1
    while True:
        ended = process.poll() is not None
        now = sum(record_file(folder, index).exists() for index in range(count))
        if now != done:
            on_done(done := now)
        if ended:
            return
        time.sleep(POLL_S)


def _record(folder: Path, index: int, job: Job, log: Path) -> MemoryRecord:
    path = record_file(folder, index)
    if not path.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = lines[-1] if lines else "no output"
        raise RunFailed(f"the dry run of {job.case.label} failed: {reason}", hint="please report this, with the job")
    return load_records(path)[0]
