"""A measurement: every case in turn on real ranks, its predictions beside it, and a run directory
that is valid at every moment."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bf16prof.cases import Job, JobFile
from bf16prof.errors import RunFailed
from bf16prof.files import NotWritten, write_json, write_text
from bf16prof.measuring.launcher import RanksOutcome, launch
from bf16prof.measuring.machine import environment, hardware, versions
from bf16prof.measuring.places import LOCAL, Place
from bf16prof.measuring.prepare import prepare
from bf16prof.measuring.record import measured_record
from bf16prof.measuring.results import RankResult, RankTask
from bf16prof.measuring.resume import NOTHING, Finished
from bf16prof.measuring.waiting import heartbeat
from bf16prof.profiles.identity import recorded
from bf16prof.records import MemoryRecord
from bf16prof.runs import (
    QUALITY,
    RESERVE,
    SPEC,
    CaseStatus,
    Manifest,
    Node,
    Run,
    Status,
    command_line,
    interrupted,
    now,
    replace,
    rows_as_csv,
    save,
    save_losses,
    save_manifest,
    save_records,
)
from bf16prof.vocabulary import Source


@dataclass(frozen=True)
class MeasurementPlan:
    """What to measure and how: the jobs and the predictions of them, the run directory, warm-up and
    measured steps, seconds per case, and further steps in which the optimizer's updates are
    watched; `origins` of the profile's values, the `place` where ranks run, and what is `kept` of a
    run that goes on."""

    name: str
    jobs: Sequence[Job]
    predictions: tuple[MemoryRecord, ...]
    folder: Path
    warmup: int
    steps: int
    timeout_s: float
    quality_steps: int = 0
    origins: Mapping[str, str] = field(default_factory=dict)
    place: Place = LOCAL
    kept: Finished = NOTHING

    def task(self, job: Job) -> RankTask:
        """What the ranks of a job are told."""
        return RankTask(JobFile.of(job), self.warmup, self.steps, self.quality_steps)


class Watcher:
    """Told how a measurement proceeds; this one keeps quiet. `commands/progress.py` draws a
    progress bar."""

    def preparing(self, what: str) -> None:
        """Extensions are compiled, or somebody else's compiling is waited for."""

    def case_begins(self, index: int, job: Job) -> None:
        """Case number `index` (from 0) is about to start."""

    def progress(self, result: RankResult) -> None:
        """Rank 0 has come further."""

    def case_ends(self, status: CaseStatus) -> None:
        """The case that was running is over."""


def measure(plan: MeasurementPlan, watcher: Watcher) -> Run:
    """Measure all cases into the run directory, which must exist and be empty.

    A case that fails does not stop the others. On KeyboardInterrupt the run is saved as interrupted
    and the exception goes on. Raises `RunFailed` when the run directory cannot be written any more;
    what was measured until then is kept.
    """
    with heartbeat(plan.folder) if plan.place.nodes > 1 else contextlib.nullcontext():
        return _measure(plan, watcher)


def _measure(plan: MeasurementPlan, watcher: Watcher) -> Run:
    run = _begin(plan)
    save(run)
    reserve = _Reserve(plan.folder)
    try:
        if plan.place.is_here:
            prepare(plan.jobs, watcher.preparing)
        for index, job in enumerate(plan.jobs):
            if job.case.label in plan.kept.cases:
                continue
            run = _with_case(run, index, CaseStatus(job.case, Status.RUNNING))
            save(run)
            watcher.case_begins(index, job)
            outcome = _run_case(plan, job, watcher.progress)
            run = _finish_case(run, index, job, outcome)
            save(run)
            watcher.case_ends(run.manifest.cases[index])
        save_losses(run)
        if plan.quality_steps:
            write_text(plan.folder / QUALITY, _quality_table(run.records))
        run = replace(run, status=_overall(run.manifest.cases), finished=now())
        save(run)
    except (NotWritten, OSError) as error:
        reserve.free()
        reason = error.message if isinstance(error, NotWritten) else f"cannot write {error.filename or plan.folder}: {error.strerror}"
        _save_aborted(_with_failure(run, reason), Status.FAILED)
        raise RunFailed(reason, hint=f"what was measured until then is in {plan.folder}") from error
    except BaseException as error:
        reserve.free()
        _save_aborted(run, Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED)
        raise
    finally:
        reserve.free()
    return run


class _Reserve:
    """Space on the disk of a run directory that is given back when it is needed, at the latest at
    the end."""

    BYTES = 2**20

    def __init__(self, folder: Path) -> None:
        self._path = folder / RESERVE
        with contextlib.suppress(OSError):
            self._path.write_bytes(os.urandom(self.BYTES))  # zeros may take no space

    def free(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _begin(plan: MeasurementPlan) -> Run:
    first = plan.jobs[0]
    manifest = Manifest(
        name=plan.name,
        created=now(),
        status=Status.RUNNING,
        device=first.device,
        argv=command_line(),
        cases=tuple(plan.kept.cases[job.case.label][0] if job.case.label in plan.kept.cases else planned(job) for job in plan.jobs),
        profile=recorded(first.profile),
        versions=versions(),
        hardware=hardware(),
        environment=environment(),
        origins=dict(plan.origins),
        nodes=plan.kept.nodes,
    )
    return Run(plan.folder, manifest, (*plan.predictions, *(record for _, record in plan.kept.cases.values())))


def planned(job: Job) -> CaseStatus:
    """A case that has not begun."""
    return CaseStatus(job.case, Status.PLANNED)


def _run_case(plan: MeasurementPlan, job: Job, on_progress: Callable[[RankResult], None]) -> RanksOutcome:
    folder = plan.folder / job.case.label
    folder.mkdir()  # whatever is there by now is not ours
    write_json(folder / SPEC, plan.task(job))
    return launch(folder, plan.place, job.case.world_size, plan.timeout_s, on_progress)


def _finish_case(run: Run, index: int, job: Job, outcome: RanksOutcome) -> Run:
    status = CaseStatus(job.case, outcome.status, outcome.message, outcome.log_tail)
    work = next((r.work for r in run.records if r.case == job.case and r.source is Source.ESTIMATE), None)
    record = measured_record(job, outcome, work)
    run = replace(run, nodes=_nodes(run.manifest.nodes, outcome))
    return _with_case(replace(run, records=(*run.records, record)) if record else run, index, status)


def _nodes(known: tuple[Node, ...], outcome: RanksOutcome) -> tuple[Node, ...]:
    """All nodes that have reported, by number."""
    found = {node.node: node for node in known} | {r.node: Node(r.node, r.host, r.hardware) for r in outcome.nodes}
    return tuple(found[number] for number in sorted(found))


def _with_case(run: Run, index: int, status: CaseStatus) -> Run:
    cases = list(run.manifest.cases)
    cases[index] = status
    return replace(run, cases=tuple(cases))


def _with_failure(run: Run, reason: str) -> Run:
    """The run whose case that was running has failed for that reason."""
    failed = (dataclasses.replace(c, status=Status.FAILED, message=reason) if c.status is Status.RUNNING else c for c in run.manifest.cases)
    return replace(run, cases=tuple(failed))


def _save_aborted(run: Run, status: Status) -> None:
    """Save the run as it stands, no case of it still `running` or `planned`: the manifest even
    where there is no space for the records."""
    aborted = Run(run.path, dataclasses.replace(interrupted(run.manifest, status), finished=now()), run.records)
    with contextlib.suppress(NotWritten):
        save_records(aborted)
    with contextlib.suppress(NotWritten):
        save_manifest(aborted)


def _overall(cases: Sequence[CaseStatus]) -> Status:
    return next((c.status for c in cases if c.status is not Status.FINISHED), Status.FINISHED)


def _quality_table(records: Sequence[MemoryRecord]) -> str:
    """The watched steps of all cases as CSV; a row without a layer is of all of them."""
    return rows_as_csv(
        ("case", "step", "loss", "layer", "elements", "lost_updates", "edq"),
        (
            (record.case.label, step.step, step.loss, layer, found.elements, found.lost_updates, found.edq)
            for record in records
            for step in record.quality
            for layer, found in {"": step.total, **step.layers}.items()
        ),
    )
