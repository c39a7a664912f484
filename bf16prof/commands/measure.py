"""`bf16prof measure`: real DeepSpeed ranks on this machine, reconciled with the estimate of the same cases."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bf16prof.cases import Job, Refusal
from bf16prof.claims import claimed
from bf16prof.commands import options as o
from bf16prof.commands.flags import Asked, MeasureFlags, takes
from bf16prof.commands.output import check_outputs, hint, print_json, report_hints, show_settings, write_files, write_report
from bf16prof.commands.request import Request, read_request, say_notes, select
from bf16prof.errors import Bf16profError, InputError, RunFailed
from bf16prof.files import NotWritten
from bf16prof.outcome import Outcome, of_run
from bf16prof.profiles.explain import REASONS
from bf16prof.profiles.features import features
from bf16prof.profiles.gpus import Gpu, gpu_named
from bf16prof.reconcile import Comparison, check_tolerance, reconcile
from bf16prof.records import Device, MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.runs import Run, Status

if TYPE_CHECKING:
    from bf16prof.commands.progress import SimulationProgress
    from bf16prof.measure.accelerator import TorchAnswer

CPU_RANKS = 2


@takes(MeasureFlags)
def measure(asked: Asked[MeasureFlags]) -> None:
    """Train for a few steps on real DeepSpeed ranks, measure every byte, and reconcile with the estimate.

    The accelerator is found, not asked for: GPUs where torch sees any, else gloo ranks on the CPU.
    """
    given = asked.flags
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
    """The measured run with its predictions, as it was written; `error`: why a dry run of the same is missing."""
    from bf16prof.commands.progress import ProgressWatcher, SimulationProgress
    from bf16prof.estimate.predict import predictions as closed_form
    from bf16prof.estimate.predict import with_work
    from bf16prof.measure.session import Plan
    from bf16prof.measure.session import measure as run_measurement

    given = asked.flags
    request = read_request(asked)
    _require_true_peaks(request)
    jobs, refused = _possible(request, given.ranks, download=given.download)
    say_notes(request, given.quiet)
    for refusal in refused:
        hint(f"left out: {refusal.case.label}: {refusal.reason}", given.quiet)
    name = request.profile.name
    origins, failed = request.resolved.origins, None
    with claimed(given.output_dir, name, force=given.force, beside=given.output or ()) as claim:
        predictions = closed_form(jobs, per_node=max(job.case.world_size for job in jobs))
        if given.simulate:
            with SimulationProgress(jobs, given.quiet) as progress:
                dry_runs, failed = _dry_run(jobs, progress)
            predictions = with_work([*predictions, *dry_runs])
        claim.clear()
        with ProgressWatcher(len(jobs), given.quiet) as watcher:
            run = run_measurement(
                Plan(name, jobs, tuple(predictions), claim.path, given.warmup, given.steps, given.timeout, given.quality, origins), watcher
            )
        try:
            write_report(run)
        except NotWritten as error:
            raise RunFailed(error.message, hint=f"the run in {run.path} is complete: bf16prof report {run.path}") from error
    said = settings(run.manifest.profile, run.manifest.origins)
    more = {"settings": said, "comparisons": reconcile(run.records), "run": str(run.path), "cases": run.manifest.cases}
    return of_run(run, more, notes=request.notes, error=failed)


def _require_true_peaks(request: Request) -> None:
    """Raise `InputError` for a DeepSpeed JSON that would have torch's peak counter reset in the middle of a step."""
    switch = "memory_breakdown"
    if request.file and features()[switch].is_on(request.file.content.get(switch)):
        reason = REASONS[f"deepspeed.{switch}"]
        raise InputError(
            f"{request.file.batch.origin}: {switch}: refused: {reason}", hint="estimate, simulate, plan and import take the file"
        )


def _dry_run(jobs: list[Job], progress: SimulationProgress) -> tuple[list[MemoryRecord], Bf16profError | None]:
    """The dry runs of these jobs that came to an end, and the error of the others, which is raised when all has been measured."""
    from bf16prof.simulate.runner import DryRunFailed, DryRunRefused, simulate

    try:
        return simulate(jobs, progress), None
    except (DryRunFailed, DryRunRefused) as error:
        hint(error.message, False)
        return list(error.records.values()), error


def _possible(request: Request, asked: int | None, *, download: bool) -> tuple[list[Job], list[Refusal]]:
    """The jobs that this machine can run, with so many ranks if they are asked for, and the refusals of the others."""
    from bf16prof.measure.accelerator import (
        require_dtypes,
        require_memory,
        require_model_library,
        require_optimizer_libraries,
        require_torch,
    )
    from bf16prof.measure.data import validate_spec

    validate_spec(request.profile.workload.data, readable=True, download=download)
    require_model_library(request.profile.model)
    torch = require_torch()
    ranks = _ranks(asked, torch)
    if torch.device is Device.CPU:
        require_memory(ranks)
    admitted, refused = select(request, gpus=str(ranks), device=torch.device, gpu=_gpu(torch))
    jobs, impossible = require_dtypes(admitted, torch)
    require_optimizer_libraries(jobs)
    return jobs, [*refused, *impossible]


def _ranks(asked: int | None, torch: TorchAnswer) -> int:
    if asked is not None and torch.gpus and asked > len(torch.gpus):
        raise InputError(f"--num-gpus {asked}: torch sees {len(torch.gpus)} on this machine")
    return asked if asked is not None else len(torch.gpus) or CPU_RANKS


def _gpu(torch: TorchAnswer) -> Gpu | None:
    """The GPU of this machine as an entry of the table: what torch says of it, with the peaks of the row that it is, if there is one."""
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
    from bf16prof.reports.console import breakdown, failures, make_console, outcome, reconciliation, run_summary

    console = make_console()
    if not verbose:
        outcome([run], console)
        failures(run, console)
        return
    run_summary(run, console)
    reconciliation([run], console)
    for record in run.records:
        breakdown(record, console)


def _check(run: Run, comparisons: list[Comparison], tolerance: float | None) -> None:
    """Leave with 3 when a case failed (2 if no rank could use what the user said), with 4 when a prediction is outside the tolerance."""
    failed = [case for case in run.manifest.cases if case.status is not Status.FINISHED]
    if failed:
        first = failed[0]
        kind = InputError if all(case.status is Status.REFUSED for case in failed) else RunFailed
        raise kind(
            f"{len(failed)} of {len(run.manifest.cases)} cases did not finish; {first.case.label}: {first.status}: {first.message}",
            hint=f"logs and partial results are in {run.path / first.case.label}",
        )
    if tolerance is not None:
        check_tolerance(comparisons, tolerance)
