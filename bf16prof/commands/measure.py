"""`bf16prof measure`: real DeepSpeed ranks, on this machine or on several, reconciled with the
estimate of the same cases."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import typer

from bf16prof.cases import Job, Refusal
from bf16prof.claims import claimed
from bf16prof.commands import options as o
from bf16prof.commands import where as w
from bf16prof.commands.flags import Asked, MeasureFlags, takes
from bf16prof.commands.measure_script import measured_script
from bf16prof.commands.output import check_outputs, hint, print_json, report_hints, show_settings, write_files, write_report
from bf16prof.commands.recording import record_for
from bf16prof.commands.request import Request, read_request, say_notes, select
from bf16prof.errors import Bf16profError, InputError, RunFailed
from bf16prof.files import NotWritten
from bf16prof.outcome import Outcome, of_run
from bf16prof.profiles.explain import REASONS
from bf16prof.profiles.features import features
from bf16prof.profiles.gpus import Gpu, gpu_named
from bf16prof.reconcile import Comparison, check_tolerance, reconcile
from bf16prof.records import MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.runs import Run, Status
from bf16prof.started_by import started_by
from bf16prof.vocabulary import Device

if TYPE_CHECKING:
    from bf16prof.commands.progress import SimulationProgress
    from bf16prof.measuring.accelerator import TorchAnswer
    from bf16prof.measuring.places import Place
    from bf16prof.measuring.session import MeasurementPlan


@takes(MeasureFlags)
def measure(asked: Asked[MeasureFlags]) -> None:
    """Train for a few steps on real DeepSpeed ranks, measure every byte, and reconcile with the
    estimate.

    With -- SCRIPT ARGUMENTS, or -- -m MODULE ARGUMENTS, your own training script is measured, which
    runs as it is.

    The accelerator is found, not asked for: GPUs where torch sees any, else gloo ranks on the CPU.
    """
    given = asked.flags
    if w.is_for_a_batch_job(given):
        if code := w.submit(given, sys.argv[1:], lambda text: hint(text, given.quiet)):
            raise typer.Exit(code)
        return
    if given.node_rank:
        w.find_place(given)
        _follow(given)
        return
    check_outputs(asked.given())
    tolerance = None if given.fail_over is None else o.percentage(given.fail_over)
    found = measured(asked)
    run = found.run
    write_files(given.output, [run], force=given.force, figure=given.figure, **found.more)
    if given.json_:
        print_json(run.records, **found.more)
    else:
        _show(run, given.verbose)
        if given.verbose:
            show_settings(run.manifest.profile, run.manifest.origins)
        report_hints(run.path, given.quiet)
    _check(run, found.more["comparisons"], tolerance)
    if found.error is not None:
        raise found.error


def measured(asked: Asked[MeasureFlags]) -> Outcome:
    """The measured run with its predictions, as it was written; `error`: why a dry run of the same
    is missing."""
    given = asked.flags
    if w.is_for_a_batch_job(given):
        raise InputError("launcher slurm: submits a command of the terminal", hint="bf16prof measure --launcher slurm")
    if given.node_rank is None:
        _require_one_process()
    place = w.find_place(given)
    if given.node_rank:
        raise InputError(f"node_rank {given.node_rank}: a node that is not the first has no results", hint="bf16prof measure --node-rank")
    if asked.script is not None:
        return measured_script(asked, asked.script, place)
    _check_resume(given)
    request = read_request(asked)
    _require_true_peaks(request)
    jobs, refused = _possible(request, given.ranks, place, download=given.download)
    if given.quality and any(job.case.pipeline_parallel > 1 for job in jobs):
        raise InputError("--quality with --pp: updates are watched of models that one rank has whole, or ZeRO's part of")
    say_notes(request, given.quiet)
    for refusal in refused:
        hint(f"left out: {refusal.case.label}: {refusal.reason}", given.quiet)
    run, failed = _run(given, request, jobs, place)
    said = settings(run.manifest.profile, run.manifest.origins)
    more = {"settings": said, "comparisons": reconcile(run.records), "run": str(run.path), "cases": run.manifest.cases}
    return of_run(run, more, notes=request.notes, error=failed)


def _run(given: MeasureFlags, request: Request, jobs: list[Job], place: Place) -> tuple[Run, Bf16profError | None]:
    """The run of these jobs in a directory of its own, with its page; and what went wrong in dry
    runs."""
    from bf16prof.closed_form.predict import predictions as closed_form
    from bf16prof.closed_form.predict import with_work
    from bf16prof.commands.progress import ProgressWatcher, SimulationProgress
    from bf16prof.measuring.session import MeasurementPlan, measure

    name, origins, failed = request.profile.name, request.resolved.origins, None
    with claimed(given.output_dir, name, force=given.force or given.resume, beside=given.output or ()) as claim:
        record_for(jobs, trace=given.trace, quiet=given.quiet)
        predictions = closed_form(jobs, per_node=max(max(place.layout(job.case.world_size).ranks) for job in jobs))
        if given.simulate:
            with SimulationProgress(jobs, given.quiet) as progress:
                dry_runs, failed = _dry_run(jobs, progress)
            predictions = with_work([*predictions, *dry_runs])
        plan = MeasurementPlan(
            name, jobs, tuple(predictions), claim.path, given.warmup, given.steps, given.timeout, given.quality, origins, place
        )
        if given.resume:
            plan = _resumed(plan, given.quiet)
        claim.clear(keep=plan.kept.cases)
        with ProgressWatcher(len(jobs), given.quiet) as watcher:
            run = measure(plan, watcher)
        try:
            write_report(run)
        except NotWritten as error:
            raise RunFailed(error.message, hint=f"the run in {run.path} is complete: bf16prof report {run.path}") from error
    return run, failed


def _require_one_process() -> None:
    """Raise `InputError` where a launcher has started several of this process: each would start its
    own ranks on the same devices."""
    started = started_by()
    if started is not None:
        raise InputError(
            f"this is process {started.rank} of {started.ranks} that {started.by} has started: measure starts its ranks itself",
            hint=f"leave the launcher out; if there is none, unset {' '.join(started.variables)}",
        )


def _follow(given: MeasureFlags) -> None:
    """Be a node of a run that the first node leads. Raises `RunFailed` unless the run finishes."""
    from bf16prof.measuring.follower import follow

    assert given.output_dir is not None
    assert given.node_rank is not None
    status = follow(given.output_dir, given.node_rank, given.timeout, lambda text: hint(text, given.quiet))
    if status is not Status.FINISHED:
        raise RunFailed(f"the run in {given.output_dir} ended: {status}", hint="node 0 has said why")


def _check_resume(given: MeasureFlags) -> None:
    if given.resume and given.force:
        raise InputError("--resume and --force exclude each other: one goes on with a run, the other replaces it")
    if given.resume and given.output_dir is None:
        raise InputError("--resume needs the --output-dir of the run that is to go on")


def _resumed(plan: MeasurementPlan, quiet: bool) -> MeasurementPlan:
    """The plan without the cases that are finished in its folder."""
    from bf16prof.measuring.resume import finished

    kept = finished(plan.folder, [plan.task(job) for job in plan.jobs])
    hint(f"resuming: {len(kept.cases)} of {len(plan.jobs)} cases are finished", quiet)
    return dataclasses.replace(plan, kept=kept)


def _require_true_peaks(request: Request) -> None:
    """Raise `InputError` for a DeepSpeed JSON that would have torch's peak counter reset in the
    middle of a step."""
    switch = "memory_breakdown"
    if request.file and features()[switch].is_on(request.file.content.get(switch)):
        reason = REASONS[f"deepspeed.{switch}"]
        raise InputError(
            f"{request.file.batch.origin}: {switch}: refused: {reason}", hint="estimate, simulate, plan and import take the file"
        )


def _dry_run(jobs: list[Job], progress: SimulationProgress) -> tuple[list[MemoryRecord], Bf16profError | None]:
    """The dry runs of these jobs that came to an end, and the error of the others, which is raised
    when all has been measured."""
    from bf16prof.dry_run.runner import DryRunFailed, DryRunRefused, simulate

    try:
        return simulate(jobs, progress), None
    except (DryRunFailed, DryRunRefused) as error:
        hint(error.message, False)
        return list(error.records.values()), error


def _possible(request: Request, asked: str | None, place: Place, *, download: bool) -> tuple[list[Job], list[Refusal]]:
    """The jobs that can run there, with so many ranks on a node if they are asked for, and the
    refusals of the others."""
    from bf16prof.measuring.accelerator import (
        require_dtypes,
        require_engine,
        require_memory,
        require_model_library,
        require_optimizer_libraries,
        require_torch,
    )
    from bf16prof.measuring.commands import on_first_node
    from bf16prof.measuring.data import validate_spec

    validate_spec(request.profile.workload.data, readable=True, download=download)
    require_model_library(request.profile.model)
    require_engine(request.profile)
    torch = require_torch(on_first_node(place))
    ranks = w.numbers_of_ranks(asked, torch, place)
    if torch.device is Device.CPU and place.is_here:
        require_memory(max(max(place.layout(total).ranks) for total in ranks))
    admitted, refused = select(request, gpus=",".join(map(str, ranks)), device=torch.device, gpu=_gpu(torch))
    jobs, impossible = require_dtypes(admitted, torch)
    require_optimizer_libraries(jobs)
    return jobs, [*refused, *impossible]


def _gpu(torch: TorchAnswer) -> Gpu | None:
    """The GPU of this machine as an entry of the table: what torch says of it, with the peaks of
    the row that it is, if there is one."""
    if not torch.gpus:
        return None
    found = torch.gpus[0]
    asked = Gpu(found.name, found.name, found.total_bytes, 0.0, 0.0, 0.0, found.compute_capability, "torch.cuda.get_device_properties")
    row = gpu_named(found.name)
    if row is None:
        return asked
    capability = row.compute_capability if row.architecture else asked.compute_capability  # an AMD GPU's own says nothing of CUDA's kernels
    return dataclasses.replace(row, id=asked.id, name=asked.name, memory_bytes=asked.memory_bytes, compute_capability=capability)


def _show(run: Run, verbose: bool) -> None:
    from bf16prof.reports.console import answer, make_console, run_summary

    console = make_console()
    if verbose:
        run_summary(run, console)
    answer([run], console, verbose=verbose)


def _check(run: Run, comparisons: list[Comparison], tolerance: float | None) -> None:
    """Leave with 3 when a case failed (2 if no rank could use what the user said), with 4 when a
    prediction is outside the tolerance."""
    failed = [case for case in run.manifest.cases if case.status is not Status.FINISHED]
    if failed:
        first = failed[0]
        kind = InputError if all(case.status is Status.REFUSED for case in failed) else RunFailed
        raise kind(
            f"{len(failed)} of {len(run.manifest.cases)} cases did not finish; {first.case.label}: {first.status}: {first.message}",
            hint=f"logs and partial results are in {folder if (folder := run.path / first.case.label).is_dir() else run.path}",
        )
    if tolerance is not None:
        check_tolerance(comparisons, tolerance)
