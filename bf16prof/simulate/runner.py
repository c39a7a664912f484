"""Dry-run jobs in processes of their own: DeepSpeed and torch.distributed keep global state, so each of several jobs gets a fresh
copy of one process that has imported both, and a single one that process itself. torch-free on this side.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.cases import Job, JobFile
from bf16prof.errors import InputError, RunFailed
from bf16prof.processes import child_environment, started
from bf16prof.records import MemoryRecord
from bf16prof.runs import load_records, read, write_bytes, write_json
from bf16prof.simulate.task import Fault, Progress, Task
from bf16prof.simulate.versions import check as check_versions
from bf16prof.simulate.versions import installed
from bf16prof.verdict import gpu_limit, judged

POLL_S = 0.05
STEPS = 2
"""The first step creates the moments, and ZeRO-3 records its trace in it; every step after the second repeats the second."""


@dataclass(frozen=True)
class Files:
    """Where task number `index` is written, and what appears beside it."""

    folder: Path
    index: int

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{self.index}"

    @property
    def task(self) -> Path:
        """What to do (`Task`)."""
        return self._file("task").with_suffix(".json")

    @property
    def record(self) -> Path:
        """The record, when it is done."""
        return self._file("record").with_suffix(".json")

    @property
    def fault(self) -> Path:
        """Why there is none (`Fault`)."""
        return self._file("fault").with_suffix(".json")

    @property
    def progress(self) -> Path:
        """How far it has come (`Progress`)."""
        return self._file("progress").with_suffix(".json")

    @property
    def snapshot(self) -> Path:
        """The allocator's snapshot, where one was asked for."""
        return self._file("snapshot").with_suffix(".pickle")

    @property
    def is_over(self) -> bool:
        """Whether there is a record or a fault."""
        return self.record.exists() or self.fault.exists()


class Watcher:
    """Told how the dry runs proceed; this one keeps quiet."""

    def progress(self, done: int, running: Sequence[tuple[int, Progress]]) -> None:
        """So many are done, and these, by index, have come so far."""


@dataclass(frozen=True)
class Options:
    """How to dry-run: with expandable segments, and with a snapshot into that file (of one job only)."""

    expandable_segments: bool = False
    snapshot: Path | None = None


@dataclass(frozen=True)
class Failed:
    """A job without a record, and why: an `InputError`, or `RunFailed`, whose message names the case."""

    job: Job
    error: InputError | RunFailed

    @property
    def reason(self) -> str:
        """Why, with the name of the case."""
        label = self.job.case.label
        return self.error.message if label in self.error.message else f"{label}: {self.error.message}"


def simulate(jobs: Sequence[Job], watcher: Watcher | None = None, options: Options | None = None) -> list[MemoryRecord]:
    """The records of these jobs, in their order.

    Raises the error of the first that failed: `InputError` when a model or a configuration cannot be used, `RunFailed` when a dry run
    breaks. On KeyboardInterrupt all processes are ended.
    """
    found = outcomes(jobs, watcher, options)
    check([outcome for outcome in found if isinstance(outcome, Failed)], len(found))
    return [outcome for outcome in found if isinstance(outcome, MemoryRecord)]


def check(failures: Sequence[Failed], count: int) -> None:
    """Raise if some of `count` dry runs failed: `InputError` if all of these are the user's to mend, else `RunFailed`."""
    if not failures:
        return
    broken = [failed for failed in failures if not isinstance(failed.error, InputError)]
    first = (broken or failures)[0]
    if count == 1:
        raise first.error
    kind = RunFailed if broken else InputError
    raise kind(f"{len(failures)} of {count} dry runs failed; {first.reason}", hint=first.error.hint)


def outcomes(jobs: Sequence[Job], watcher: Watcher | None = None, options: Options | None = None) -> list[MemoryRecord | Failed]:
    """The record of each job, in their order, or why there is none: one that fails takes no other with it.

    Raises `InputError` where an installed package is too old or known not to work.
    """
    options = options or Options()
    assert options.snapshot is None or len(jobs) == 1, "one snapshot is of one job"
    check_versions(installed(jobs))  # before anything of theirs is imported, which may be what does not work
    with tempfile.TemporaryDirectory(prefix="bf16prof-") as name:
        tasks = [Files(Path(name), index) for index in range(len(jobs))]
        for files, job in zip(tasks, jobs, strict=True):
            write_json(files.task, Task(JobFile.of(job), STEPS, options.expandable_segments, options.snapshot is not None))
        log = Path(name) / "log"
        command = [sys.executable, "-m", "bf16prof.simulate.worker", name, str(len(jobs))]
        with started(command, log, child_environment(), signal.SIGKILL) as process:
            _watch(process, tasks, watcher or Watcher())
        found = [_outcome(files, job, log) for files, job in zip(tasks, jobs, strict=True)]
        if options.snapshot is not None and isinstance(found[0], MemoryRecord):
            write_bytes(options.snapshot, tasks[0].snapshot.read_bytes())
        return found


def _watch(process: subprocess.Popen[bytes], tasks: Sequence[Files], watcher: Watcher) -> None:
    while process.poll() is None:
        over = [files.is_over for files in tasks]
        running = [files for files, is_over in zip(tasks, over, strict=True) if not is_over and files.progress.exists()]
        watcher.progress(sum(over), [(files.index, read(files.progress, Progress)) for files in running])
        time.sleep(POLL_S)


def _outcome(files: Files, job: Job, log: Path) -> MemoryRecord | Failed:
    if files.record.exists():
        record = load_records(files.record)[0]
        return record if job.gpu is None else judged(dataclasses.replace(record, limit_bytes=gpu_limit(job.gpu, job.case.world_size)))
    if files.fault.exists():
        fault: Fault = read(files.fault, Fault)
        if fault.is_input:
            return Failed(job, InputError(fault.message, hint=fault.hint))
        return Failed(job, RunFailed(f"the dry run of {job.case.label} failed: {fault.message}", hint="please report this, with the job"))
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Failed(job, RunFailed(f"the dry run of {job.case.label} ended early: {lines[-1] if lines else 'no output'}"))
