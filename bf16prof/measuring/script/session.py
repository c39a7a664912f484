"""A measurement of a script on ranks that we start: a run directory that is valid at every moment,
and the join of what ranks wrote."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bf16prof.documents import as_json
from bf16prof.errors import RunFailed
from bf16prof.files import NotWritten, write_json
from bf16prof.measuring.launcher import RanksOutcome, launch
from bf16prof.measuring.machine import environment, hardware, versions
from bf16prof.measuring.places import Place
from bf16prof.measuring.prepare import of_cpu_script, prepare_parts
from bf16prof.measuring.results import GuestTask
from bf16prof.measuring.script.join import UNKNOWN_CASE, join
from bf16prof.measuring.waiting import heartbeat
from bf16prof.records import Case, MemoryRecord
from bf16prof.runs import (
    SCRIPT,
    SCRIPT_FOLDER,
    CaseStatus,
    Manifest,
    Run,
    Status,
    command_line,
    interrupted,
    now,
    save,
    save_manifest,
)
from bf16prof.vocabulary import Device


@dataclass(frozen=True)
class ScriptPlan:
    """What to measure: the task of every rank, the run directory, where ranks run and how many, on
    what, and for how long at most."""

    task: GuestTask
    folder: Path
    place: Place
    world_size: int
    device: Device
    timeout_s: float
    predictions: tuple[MemoryRecord, ...] = ()
    is_shown: bool = True


def measure_script(plan: ScriptPlan, say: Callable[[str], None]) -> Run:
    """Run the script on all ranks and join what they wrote. On KeyboardInterrupt the run is saved
    as interrupted, and it goes on.

    Raises `RunFailed` when the run directory cannot be written any more.
    """
    manifest = _begin(plan)
    try:
        save(Run(plan.folder, manifest, plan.predictions))
        with heartbeat(plan.folder) if plan.place.nodes > 1 else contextlib.nullcontext():
            outcome = _launched(plan, say)
        return _joined(plan, manifest, outcome)
    except (NotWritten, OSError) as error:
        reason = error.message if isinstance(error, NotWritten) else f"cannot write {error.filename or plan.folder}: {error.strerror}"
        _save_aborted(plan, manifest, Status.FAILED)
        raise RunFailed(reason, hint=f"what was measured until then is in {plan.folder}") from error
    except BaseException as error:
        _save_aborted(plan, manifest, Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED)
        raise


def _launched(plan: ScriptPlan, say: Callable[[str], None]) -> RanksOutcome:
    if plan.place.is_here and plan.device is Device.CPU:
        prepare_parts(of_cpu_script(), say)
    folder = plan.folder / SCRIPT_FOLDER
    folder.mkdir()  # whatever is there by now is not ours
    write_json(folder / SCRIPT, plan.task)
    say(f"{plan.task.script.name}: starting {plan.world_size} ranks")
    return launch(folder, plan.place, plan.world_size, plan.timeout_s, lambda _: None, is_shown=plan.is_shown)


def _begin(plan: ScriptPlan) -> Manifest:
    name = plan.task.script.name
    return Manifest(
        name=name,
        created=now(),
        status=Status.RUNNING,
        device=plan.device,
        argv=command_line(),
        cases=(CaseStatus(Case(name, 0, plan.world_size, UNKNOWN_CASE), Status.RUNNING),),
        profile={"script": as_json(plan.task.script)},
        versions=versions(),
        hardware=hardware(),
        environment=environment(),
    )


def _joined(plan: ScriptPlan, manifest: Manifest, outcome: RanksOutcome) -> Run:
    """The run of what ranks wrote; where none wrote anything, the manifest says how it ended."""
    if any(rank is not None for rank in outcome.ranks):
        return join(plan.folder, outcome, plan.predictions, created=manifest.created)
    cases = tuple(dataclasses.replace(case, status=outcome.status, message=outcome.message) for case in manifest.cases)
    cases = tuple(dataclasses.replace(case, log_tail=outcome.log_tail) for case in cases)
    run = Run(plan.folder, dataclasses.replace(manifest, status=outcome.status, cases=cases, finished=now()), plan.predictions)
    save(run)
    return run


def _save_aborted(plan: ScriptPlan, manifest: Manifest, status: Status) -> None:
    """Save what ranks wrote until then, or at least that the run is over."""
    with contextlib.suppress(Exception):
        run = join(plan.folder, None, plan.predictions, created=manifest.created)
        manifest = run.manifest
    with contextlib.suppress(NotWritten):
        save_manifest(Run(plan.folder, dataclasses.replace(interrupted(manifest, status), finished=now()), ()))
