"""`bf16prof simulate`: the real DeepSpeed engine on fake tensors, at any scale, with no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bf16prof.cases import Job, Refusal
from bf16prof.commands.flags import Asked, SimulateFlags, takes
from bf16prof.commands.output import (
    check_judged_device,
    check_outputs,
    finished_run,
    hint,
    hint_caveats,
    print_json,
    require_fit,
    show_settings,
    with_host_per_node,
    write_files,
)
from bf16prof.commands.request import Request, read_request, say_notes, select
from bf16prof.commands.simulate_script import refuse_script_flags, simulate_script
from bf16prof.engine.megatron.settings import update_note
from bf16prof.errors import Bf16profError, InputError
from bf16prof.outcome import Outcome, of_run
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.identity import recorded
from bf16prof.records import MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.runs import Run
from bf16prof.verdict import Allocator
from bf16prof.vocabulary import Device


@takes(SimulateFlags)
def simulate(asked: Asked[SimulateFlags]) -> None:
    """Dry-run the real DeepSpeed engine on fake tensors, as one rank of a job of any size, and
    record every byte it would hold.

    With -- SCRIPT ARGUMENTS, or -- -m MODULE ARGUMENTS, the engine is that of your own training
    script, which runs as it is.
    """
    given = asked.flags
    check_outputs(asked.given())
    if asked.script is not None:
        simulate_script(asked, asked.script)
        return
    check_judged_device(given.fail_unless_fits, Device(given.device))
    request = read_request(asked)
    found = simulated(asked, request)
    write_files(given.output, [found.run], force=given.force, figure=given.figure, **found.more)
    if given.json_:
        print_json(found.records, **found.more)
    else:
        _show(found.run, found.records, given.verbose)
        _show_changes(request, given)
        if not given.verbose and len(found.records) > 1:
            hint_caveats(find_gpu(given.gpu) if given.device is Device.GPU else None, given.quiet)
    if found.error is not None:
        raise found.error
    require_fit(found.records, given.fail_unless_fits)
    hint(_next(found.records), given.quiet or given.json_)


def simulated(asked: Asked[SimulateFlags], request: Request) -> Outcome:
    """The dry runs of all cases that are asked for, with the estimates of the same beside them in
    `run`.

    Where some fail, the outcome has the others, and the error.
    """
    from bf16prof.closed_form.predict import predictions, with_work
    from bf16prof.commands.progress import SimulationProgress
    from bf16prof.dry_run.runner import DryRunFailed, DryRunRefused, Options
    from bf16prof.dry_run.runner import simulate as run
    from bf16prof.measuring.accelerator import require_engine, require_model_library, require_optimizer_libraries, require_packages

    given = asked.flags
    refuse_script_flags(asked)
    require_packages("simulating")
    target = find_gpu(given.gpu) if given.device is Device.GPU else None
    require_model_library(request.profile.model)
    require_engine(request.profile)
    jobs, refused = select(request, gpus=given.gpus, device=Device(given.device), gpu=target)
    require_optimizer_libraries(jobs)
    if given.snapshot is not None and len(jobs) != 1:
        raise InputError(
            f"--snapshot {given.snapshot}: a snapshot is of one case, these are {len(jobs)}", hint="name one stage, size and recipe"
        )
    say_notes(request, given.quiet)
    for note in update_note(jobs[0]):
        hint(f"note: {note}", given.quiet)
    failed: Bf16profError | None = None
    with SimulationProgress(jobs, given.quiet) as progress:
        try:
            records = run(jobs, progress, Options(given.expandable_segments, given.snapshot, given.force))
        except (DryRunFailed, DryRunRefused) as error:  # the others are shown all the same
            if not error.records:
                raise
            refused = [*refused, *(Refusal(jobs[index].case, reason) for index, reason in error.reasons.items())]
            failed, records, jobs = error, list(error.records.values()), [jobs[index] for index in error.records]
        records = _with_way_out(jobs, records, lambda others: run(others, None, Options(given.expandable_segments)))
    records = with_host_per_node(records, given.gpus_per_node)
    both = with_work([*records, *predictions(jobs, given.gpus_per_node, Allocator(given.expandable_segments))])
    records = both[: len(records)]
    trained, origins = recorded(jobs[0].profile), request.resolved.origins
    more = {"settings": settings(trained, origins), "refused": refused}
    result = finished_run(f"simulate {request.profile.name}", both, trained, origins)
    return of_run(result, more, records, request.notes, failed)


def _show(result: Run, records: Sequence[MemoryRecord], verbose: bool) -> None:
    from bf16prof.reports.console import breakdown, holders, make_console, outcome, reconciliation

    console = make_console()
    if not verbose:
        outcome([result], console)
        for record in records if len(records) == 1 else ():
            holders(record, console)
        return
    reconciliation([result], console)
    for record in records:
        breakdown(record, console)
    show_settings(result.manifest.profile, result.manifest.origins)


def _show_changes(request: Request, given: SimulateFlags) -> None:
    """Print which changes give memory back, where one job was asked for and the closed form knows
    it."""
    from bf16prof.planning.from_job import what_gives_back
    from bf16prof.reports.console import changes_view, make_console

    if given.device is not Device.GPU or request.profile.is_for_megatron:
        return
    gpu = find_gpu(given.gpu)
    jobs, _ = select(request, gpus=given.gpus, device=Device(given.device), gpu=gpu)
    if len(jobs) == 1:
        changes_view(what_gives_back(jobs[0], gpu), make_console())


def _with_way_out(
    jobs: Sequence[Job], records: Sequence[MemoryRecord], run: Callable[[Sequence[Job]], Sequence[MemoryRecord]]
) -> list[MemoryRecord]:
    """The records; where only init does not fit, each with the peak of the same job built inside
    `zero.Init`, which is run for it."""
    places = [place for place, (job, record) in enumerate(zip(jobs, records, strict=True)) if _only_init_is_too_large(job, record)]
    inside = run([_inside_zero_init(jobs[place]) for place in places]) if places else []
    found = list(records)
    for place, other in zip(places, inside, strict=True):
        found[place] = dataclasses.replace(found[place], inside_zero_init_bytes=other.run_peak_allocated_bytes)
    return found


def _only_init_is_too_large(job: Job, record: MemoryRecord) -> bool:
    limit, whole, training = record.limit_bytes, record.run_peak_allocated_bytes, record.peak_allocated_bytes
    if limit is None or whole is None or training is None:
        return False
    may_go_inside = not job.is_inside_zero_init and job.profile.quantization is None
    return training <= limit < whole and job.case.zero_stage == 3 and may_go_inside


def _inside_zero_init(job: Job) -> Job:
    workload = job.profile.workload.model_copy(update={"zero_init": True})
    return dataclasses.replace(job, profile=job.profile.model_copy(update={"workload": workload}))


def _next(records: Sequence[MemoryRecord]) -> str:
    """The command to type next."""
    if any(record.inside_zero_init_bytes is not None for record in records):
        return "next: the same with --zero-init   (ZeRO-3 then never has the whole model on the device)"
    return "next: bf16prof measure --simulate   (the same on real ranks, where there are any)"
