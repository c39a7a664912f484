"""Dry-run jobs in processes of their own: DeepSpeed and torch.distributed keep global state, so
each of several jobs gets a fresh copy of one process that has imported both, and a single one that
process itself. torch-free on this side.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from bf16prof.cases import Job, JobFile
from bf16prof.dry_run.stages import of_all_stages, ranks_run, severity
from bf16prof.dry_run.task import Fault, Progress, Task
from bf16prof.dry_run.versions import check as check_versions
from bf16prof.dry_run.versions import installed
from bf16prof.engine.megatron.layout import fullest_rank_of
from bf16prof.errors import InputError, RunFailed
from bf16prof.files import last_lines, write_bytes, write_json
from bf16prof.memory_kills import MemoryKills
from bf16prof.processes import child_environment, require_proc, signal_name, started
from bf16prof.records import MemoryRecord
from bf16prof.runs import load_records, read
from bf16prof.scratch import temporary_folder
from bf16prof.verdict import gpu_limit, judged

POLL_S = 0.05
TOO_BIG = "a dry run takes a few GB: try fewer cases at a time"
STEPS = 2
"""The first step creates the moments, and ZeRO-3 records its trace in it; every step after the
second repeats the second."""


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
    def described(self) -> Path:
        """What a script trains (`Described`)."""
        return self._file("described").with_suffix(".json")

    @property
    def progress(self) -> Path:
        """How far it has come (`Progress`)."""
        return self._file("progress").with_suffix(".json")

    @property
    def snapshot(self) -> Path:
        """The allocator's snapshot, where one was asked for."""
        return self._file("snapshot").with_suffix(".pickle")

    @property
    def sent(self) -> Path:
        """What a stage of a pipeline sends on (`stages.Sent`)."""
        return self._file("sent").with_suffix(".json")

    @property
    def is_over(self) -> bool:
        """Whether there is a record or a fault."""
        return self.record.exists() or self.fault.exists()


class DryRunWatcher:
    """Told how the dry runs proceed; this one keeps quiet."""

    def progress(self, done: int, running: Sequence[tuple[int, Progress]]) -> None:
        """So many are done, and these, by index, have come so far."""


@dataclass(frozen=True)
class Options:
    """How to dry-run: with expandable segments, and with a snapshot into that file (of one job
    only), which may replace another."""

    expandable_segments: bool = False
    snapshot: Path | None = None
    replace: bool = False


def simulate(jobs: Sequence[Job], watcher: DryRunWatcher | None = None, options: Options | None = None) -> list[MemoryRecord]:
    """The records of these jobs, in their order.

    Raises, after all have come to their end, for those that failed: `DryRunRefused` when one of
    these is what a user can mend, a model or a configuration, else `DryRunFailed`; `InputError`
    where an installed package is too old or known not to work. On KeyboardInterrupt all processes
    are ended.
    """
    options = options or Options()
    assert options.snapshot is None or len(jobs) == 1, "one snapshot is of one job"
    require_proc("simulating")
    check_versions(installed(jobs))  # before anything of theirs is imported, which may be what does not work
    with temporary_folder() as folder:
        runs = [(index, rank) for index, job in enumerate(jobs) for rank in _ranks(job)]
        tasks = [_Run(Files(folder, number), index, jobs[index], rank) for number, (index, rank) in enumerate(runs)]
        for run in tasks:
            job = JobFile.of(run.job)
            write_json(run.files.task, Task(job, STEPS, options.expandable_segments, options.snapshot is not None, run.rank))
        log = folder / "log"
        command = [sys.executable, "-m", "bf16prof.dry_run.worker", str(folder), str(len(tasks))]
        kills = MemoryKills()
        with started(command, log, child_environment(folder), signal.SIGKILL) as process:
            _watch(process, tasks, watcher or DryRunWatcher())
        found = _found(tasks, _Ending(process.returncode, kills.happened(), log))
        records = [of_all_stages(of_job) for of_job in found.values()]
        if options.snapshot is not None:
            shown = found[0].index(max(found[0], key=severity))
            write_bytes(options.snapshot, tasks[shown].files.snapshot.read_bytes(), replace=options.replace)
        return records


def _ranks(job: Job) -> list[int]:
    """The ranks that are run: the one that holds most, of a pipeline the first of each stage."""
    return [fullest_rank_of(job)] if job.profile.is_for_megatron else ranks_run(job.case)


@dataclass(frozen=True)
class _Run:
    """One dry run: its files, the job by number, and the rank that is run."""

    files: Files
    index: int
    job: Job
    rank: int


def _watch(process: subprocess.Popen[bytes], tasks: Sequence[_Run], watcher: DryRunWatcher) -> None:
    while process.poll() is None:
        open_ = [run for run in tasks if not run.files.is_over]
        running = [run for run in open_ if run.files.progress.exists()]
        done = len({run.index for run in tasks} - {run.index for run in open_})
        watcher.progress(done, [(run.index, read(run.files.progress, Progress)) for run in running])
        time.sleep(POLL_S)


@dataclass(frozen=True)
class _Ending:
    """How the process that ran the tasks ended: its exit code, whether the kernel killed for memory
    meanwhile, and its log."""

    code: int
    by_kernel: bool
    log: Path

    def reason(self) -> str:
        """Why a task has left nothing."""
        if self.code < 0:
            return killed(-self.code, self.by_kernel)
        return (last_lines(self.log, 1) or [f"exit code {self.code}, and no output"])[0]


class DryRunFailed(RunFailed):
    """One or more dry runs broke. `records`: those of the others, by the index of their job;
    `reasons`: why there is none, likewise."""

    records: Mapping[int, MemoryRecord] = MappingProxyType({})
    reasons: Mapping[int, str] = MappingProxyType({})


class DryRunRefused(InputError):
    """One or more dry runs could not use what they were given; with the same attributes."""

    records: Mapping[int, MemoryRecord] = MappingProxyType({})
    reasons: Mapping[int, str] = MappingProxyType({})


def killed(number: int, by_kernel: bool) -> str:
    """What became of a process that a signal has ended."""
    if by_kernel and number == signal.SIGKILL:
        return "killed by the kernel, for there was no memory left (SIGKILL)"
    return f"killed by {signal_name(number)}"


def _found(tasks: Sequence[_Run], ending: _Ending) -> dict[int, list[MemoryRecord]]:
    """The records of all jobs, by number, of each one for every rank that was run. Raises for those
    that left none, bad input first."""
    found: dict[int, list[MemoryRecord]] = {}
    faults: dict[int, Fault] = {}
    labels = {run.index: run.job.case.label for run in tasks}
    for run in tasks:
        if run.files.record.exists():
            found.setdefault(run.index, []).append(_record(run.files, run.job))
        else:
            faults.setdefault(run.index, _fault(run.files, ending))
    if not faults:
        return found
    refused = {index: fault for index, fault in faults.items() if fault.is_input}
    index, first = next(iter((refused or faults).items()))
    label, more = labels[index], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    error: DryRunFailed | DryRunRefused
    if refused:
        named = f"{label}{more}: " if len(labels) > 1 else ""
        error = DryRunRefused(f"{named}{first.message}", hint=first.hint)
    else:
        error = DryRunFailed(f"the dry run of {label} failed{more}: {first.message}", hint=first.hint)
    whole = {index: of_all_stages(records) for index, records in found.items() if index not in faults}
    error.records, error.reasons = whole, {place: fault.message for place, fault in faults.items()}
    raise error


def _record(files: Files, job: Job) -> MemoryRecord:
    record = load_records(files.record)[0]
    return record if job.gpu is None else judged(dataclasses.replace(record, limit_bytes=gpu_limit(job.gpu, job.case.world_size)))


def _fault(files: Files, ending: _Ending) -> Fault:
    if not files.fault.exists():
        return Fault(ending.reason(), TOO_BIG, is_input=False)
    fault: Fault = read(files.fault, Fault)
    return fault
