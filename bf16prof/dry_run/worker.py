"""The process that dry-runs jobs. One job runs in it; for several it imports torch and DeepSpeed
once and forks for each, as many at a time as there are cores.

Run as `python -m bf16prof.dry_run.worker FOLDER COUNT`; for task N it writes a record, or a fault
(`runner.Files`), and its progress.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bf16prof.documents import as_json, raw_document
from bf16prof.dry_run.runner import TOO_BIG, Files, killed
from bf16prof.dry_run.stages import told
from bf16prof.dry_run.task import Fault, Progress, Task
from bf16prof.engine.megatron.settings import MODULE, PACKAGE
from bf16prof.errors import Bf16profError, InputError
from bf16prof.files import write_json
from bf16prof.memory_kills import MemoryKills
from bf16prof.processes import die_with_parent
from bf16prof.profiles.sizes import clash
from bf16prof.runs import read

SAY_EVERY_S = 0.1


def run_task(files: Files) -> None:
    """One task in this process, which must do nothing else before or after."""
    from bf16prof.dry_run.dryrun import dry_run

    try:
        task: Task = read(files.task, Task)
        record, ledger = dry_run(task, ProgressFile(files.progress), _neighbours(task, files))
        if task.snapshot:
            from bf16prof.dry_run.snapshot import write_snapshot

            write_snapshot(files.snapshot, ledger)
        write_json(files.record, raw_document([record]))
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that waits has to hear of it
        traceback.print_exc()
        write_json(files.fault, _with_clash(_fault(error), files))
    sys.stderr.flush()
    os._exit(0)


def _neighbours(task: Task, files: Files) -> AbstractContextManager[None]:
    """What connects a stage of a pipeline with the one before it, whose task has the number
    before."""
    if task.job.case.pipeline_parallel == 1:
        return contextlib.nullcontext()
    before = Files(files.folder, files.index - 1) if task.job.case.parallelism.stage(task.rank) else None
    return told(files.sent, before.sent if before else None, lambda: before is not None and before.is_over)


class ProgressFile:
    """Writes the progress to a file, not too often."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, 0.0

    def __call__(self, progress: Progress) -> None:
        """Write it, unless that was done a moment ago."""
        if time.monotonic() - self._last > SAY_EVERY_S:
            self._last = time.monotonic()
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(as_json(progress)), encoding="utf-8")
            fresh.replace(self._path)


def _fault(error: Exception) -> Fault:
    line = " ".join(str(error).split()) or _place(error)
    if isinstance(error, Bf16profError):
        return Fault(error.message, error.hint, is_input=isinstance(error, InputError))
    if isinstance(error, OverflowError) or "calculation overflowed" in line:  # torch counts the bytes of a storage in 64 bits
        return Fault(f"nothing can hold a tensor of these sizes: {line}", "look at the sizes of model and workload", is_input=True)
    if comes_from_checking(error):
        return Fault(f"DeepSpeed refuses this configuration: {line}", "", is_input=True)
    return Fault(f"{type(error).__name__}: {line}", "please report this, with the job", is_input=False)


def _with_clash(fault: Fault, files: Files) -> Fault:
    """The fault with the two sizes of a configuration that may be behind it."""
    model = _profile(files).get("model", {})
    found = clash(model.get("hf_config", {})) if fault.is_input else None
    return fault if found is None else dataclasses.replace(fault, message=f"{found}: {fault.message}")


def _profile(files: Files) -> dict[str, Any]:
    """The profile of a task as its file has it; nothing where that cannot be read, which its fork
    says."""
    try:
        found: dict[str, Any] = read(files.task, Task).job.profile
        return found
    except InputError:
        return {}


def _place(error: Exception) -> str:
    """Where an error without words was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.line} ({'/'.join(Path(last.filename).parts[-2:])}, line {last.lineno})"


def comes_from_checking(error: Exception) -> bool:
    """Whether DeepSpeed has said no: to its configuration, while building its engine, or to what it
    meets in a step."""
    frames = traceback.extract_tb(error.__traceback__)
    building = any(frame.name == "initialize" and "deepspeed" in frame.filename for frame in frames)
    by_deepspeed = any(package in frames[-1].filename for package in (f"{os.sep}deepspeed{os.sep}", f"{os.sep}pydantic{os.sep}"))
    if not by_deepspeed or _is_about_a_value(error, building):
        return False
    said = isinstance(error, AssertionError | NotImplementedError) or type(error).__module__.startswith("deepspeed")
    return said or (building and isinstance(error, ValueError | RuntimeError | TypeError))


def _is_about_a_value(error: Exception, building: bool) -> bool:
    """Whether an assertion without words failed in a step: it checks a number, which a dry run does
    not have."""
    return isinstance(error, AssertionError) and not str(error) and not building


def import_first(models: Iterable[Mapping[str, Any]] = ()) -> None:
    """Import what every fork would import for itself, which takes longer than its dry run: the code
    of these models, too."""
    for name in ("torch._dynamo", "bf16prof.dry_run.dryrun"):
        importlib.import_module(name)
    for model in (each for each in models if "hf_config" in each):
        with contextlib.suppress(Exception):  # whatever is wrong with it, the fork that needs it says so
            importlib.import_module("transformers.modeling_utils")
            auto = importlib.import_module("transformers.models.auto.configuration_auto")
            module = auto.model_type_to_module_name(model["hf_config"]["model_type"])
            importlib.import_module(f"transformers.models.{module}.modeling_{module}")


def _task_process(files: Files) -> None:
    die_with_parent()
    run_task(files)


def main() -> None:
    """Run all tasks of the folder."""
    die_with_parent()
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    if count == 1:
        run_task(Files(folder, 0))
    os.environ["DS_ACCELERATOR"] = "cpu"
    waiting = [Files(folder, index) for index in range(count)]
    profiles = [_profile(files) for files in waiting]
    import_first(profile.get("model", {}) for profile in profiles)
    if any(profile.get("engine") == PACKAGE for profile in profiles):
        from bf16prof.dry_run.compiler import import_uncompiled

        import_uncompiled(MODULE)

    context, kills = multiprocessing.get_context("fork"), MemoryKills()
    running: dict[Files, multiprocessing.process.BaseProcess] = {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            files = waiting.pop(0)
            running[files] = context.Process(target=_task_process, args=(files,))
            running[files].start()
        multiprocessing.connection.wait([process.sentinel for process in running.values()])
        for files in [files for files, process in running.items() if not process.is_alive()]:
            _say_how_it_ended(files, running.pop(files).exitcode or 0, kills)


def _say_how_it_ended(files: Files, code: int, kills: MemoryKills) -> None:
    """Leave a fault for a process that left nothing."""
    if not files.is_over:
        how = killed(-code, kills.happened()) if code < 0 else f"its process ended with exit code {code}"
        write_json(files.fault, Fault(how, TOO_BIG if code < 0 else "", is_input=False))


if __name__ == "__main__":
    main()
