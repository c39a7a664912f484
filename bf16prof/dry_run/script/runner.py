"""Starts the dry run of a script in a process of its own, and waits for it. torch-free."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bf16prof.dry_run.runner import POLL_S, TOO_BIG, DryRunFailed, DryRunRefused, Files, Options, killed
from bf16prof.dry_run.script.task import ScriptTask
from bf16prof.dry_run.task import Fault, Progress
from bf16prof.files import last_lines, write_bytes, write_json
from bf16prof.memory_kills import MemoryKills
from bf16prof.processes import child_environment, require_proc, started
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import MemoryRecord
from bf16prof.runs import load_records, read
from bf16prof.scratch import temporary_folder
from bf16prof.scripts.described import Described
from bf16prof.verdict import gpu_limit, judged
from bf16prof.whereabouts import DEADLINE, read_where, where_they_were


@dataclass(frozen=True)
class ScriptOutcome:
    """What came of a script: the record of its steps, or why there is none, or both where it failed
    after some steps.

    `described`: the model of a record, for its estimate.
    """

    record: MemoryRecord | None
    failure: DryRunFailed | DryRunRefused | None
    described: Described = field(default_factory=Described)


def simulate_script(task: ScriptTask, timeout: float, on_progress: Callable[[Progress], None], options: Options) -> ScriptOutcome:
    """Run it; it gets `timeout` seconds. Where there is a record, a snapshot is written if the
    options name a file."""
    name = task.script.name
    require_proc("simulating")
    with temporary_folder() as folder:
        files, log = Files(folder, 0), folder / "log"
        write_json(files.task, task)
        command = [sys.executable, "-m", "bf16prof.dry_run.script.worker", str(folder)]
        kills = MemoryKills()
        deadline = time.monotonic() + timeout
        with started(command, log, child_environment(folder) | {DEADLINE: str(deadline)}, signal.SIGKILL) as process:
            while process.poll() is None and time.monotonic() < deadline:
                if files.progress.exists():
                    on_progress(read(files.progress, Progress))
                time.sleep(POLL_S)
            code = process.poll()
        record = _record(files, task) if files.record.exists() else None
        said = read(files.described, Described) if record is not None else Described()
        if record is not None and options.snapshot is not None:
            write_bytes(options.snapshot, files.snapshot.read_bytes(), replace=options.replace)
        if files.fault.exists():
            return ScriptOutcome(record, _failure(read(files.fault, Fault), log), said)
        if record is not None:
            return ScriptOutcome(record, None, said)
        if code is None:
            there = where_they_were([read_where(folder, task.rank)])
            how = f"{name} has not come to {task.steps} steps after {timeout:g} seconds (--timeout): {there}"
        else:
            how = f"{name} was {killed(-code, kills.happened())}" if code < 0 else f"{name} left with exit code {code}"
        return ScriptOutcome(None, _failure(Fault(how, TOO_BIG if code is not None and code < 0 else "", is_input=False), log))


def _record(files: Files, task: ScriptTask) -> MemoryRecord:
    record = load_records(files.record)[0]
    if task.gpu is None:
        return record
    return judged(dataclasses.replace(record, limit_bytes=gpu_limit(find_gpu(task.gpu), task.world_size)))


def _failure(fault: Fault, log: Path) -> DryRunFailed | DryRunRefused:
    """The fault as an error, whose hint is the end of what the script printed, where nothing better
    is known."""
    tail = " ".join(last_lines(log, 1))
    hint = fault.hint or (f"its output ended with: {tail[:300]}" if tail and tail not in fault.message else "")
    return (DryRunRefused if fault.is_input else DryRunFailed)(fault.message, hint=hint)
