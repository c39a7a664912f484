"""`bf16prof estimate`: the closed form, over a grid of ZeRO stages, GPU counts and recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bf16prof.cases import Job, Refusal
from bf16prof.commands.again import how_it_runs, next_command
from bf16prof.commands.engines import is_on_megatron
from bf16prof.commands.flags import Asked, EstimateFlags, takes
from bf16prof.commands.output import (
    check_judged_device,
    check_outputs,
    finished_run,
    hint,
    hint_caveats,
    print_json,
    require_fit,
    show_settings,
    write_files,
)
from bf16prof.commands.recording import record_for
from bf16prof.commands.request import Request, read_request, say_notes, select
from bf16prof.commands.working import working
from bf16prof.errors import Refused
from bf16prof.outcome import Outcome, of_run
from bf16prof.profiles.gpus import Gpu, find_gpu
from bf16prof.profiles.identity import recorded
from bf16prof.records import Case, MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.runs import Run, load
from bf16prof.verdict import Allocator, Replays
from bf16prof.vocabulary import Device, Offload, Verdict

FEW_CASES = 12
"""Up to this many cases the textbook accountings are shown beside ours, which would drown a larger
grid, and the allocator is replayed for all of them, not only where the verdict turns on it (`-v`:
for any number)."""


@takes(EstimateFlags)
def estimate(asked: Asked[EstimateFlags]) -> None:
    """Predict the memory of one GPU in closed form: every persistent byte, in milliseconds, without
    torch.

    What a step has to compute, to send and to update comes with it (-v), and the time below which
    no such GPU can do it.
    """
    given = asked.flags
    check_outputs(asked.given())
    check_judged_device(given.fail_unless_fits, Device(given.device))
    request = read_request(asked)
    found = estimated(asked, request)
    records, trained, origins = found.records, found.run.manifest.profile, found.run.manifest.origins
    say_notes(request, given.quiet)
    write_files(given.output, [found.run], force=given.force, figure=given.figure, **found.more)
    if given.json_:
        print_json(records, **found.more)
    else:
        accounts = {row["case"]: row["bytes"] for row in found.more["textbook"]}
        _show(found.run, found.refused, accounts, given.verbose)
        if given.verbose:
            show_settings(trained, origins)
        elif len(records) > 1:
            hint_caveats(_target(given), given.quiet)
    require_fit(records, given.fail_unless_fits)
    if given.json_:
        return
    if (records[0].peak_allocated_bytes is None or records[0].at_least) and records[0].notes:
        hint(f"note: {records[0].notes[0]}", given.quiet)
    hint(_next(asked, records), given.quiet)


def _next(asked: Asked[EstimateFlags], records: Sequence[MemoryRecord]) -> str:
    """The command to type next: the dry run of the one case that fits, or of ranks that share a
    batch, else what fits.

    On CPU ranks it is the measurement, of the demo where nobody named a model: what is assumed then
    is too large for a CPU.
    """
    given, first = asked.flags, records[0].case
    case = ["--zero", str(first.zero_stage), "--recipe", first.recipe]
    case += ["--offload", first.offload] if first.offload is not Offload.NONE else []
    if Device(given.device) is Device.CPU:
        if not any(asked.is_named(name) for name in ("subject", "hf_config", "model", "profile")):
            return "next: bf16prof measure cpu-demo --simulate   (real DeepSpeed ranks)"
        return next_command("measure", asked, *case, "--num-gpus", str(first.world_size), *how_it_runs(asked), "--simulate")
    gpu = ["--gpu", str(given.gpu)]
    without_plan = not first.parallelism.is_data_only or is_on_megatron(records[0])
    if without_plan or (len(records) == 1 and records[0].verdict is Verdict.FITS):
        why = "   (peaks, from the real engine)" if without_plan else ""
        return next_command("simulate", asked, *case, "--gpus", str(first.world_size), *gpu, *how_it_runs(asked)) + why
    sizes = ["--gpus", str(given.gpus)] if asked.is_named("gpus") else []
    return next_command("plan", asked, *sizes, *gpu) + "   (what fits, ranked)"


def _target(given: EstimateFlags) -> Gpu | None:
    return find_gpu(given.gpu) if given.device is Device.GPU else None


def estimated(asked: Asked[EstimateFlags], request: Request) -> Outcome:
    """The estimates of all cases that are asked for."""
    from bf16prof.closed_form.predict import predict
    from bf16prof.closed_form.textbook import textbook

    given = asked.flags
    jobs, refused = select(request, gpus=given.gpus, device=Device(given.device), gpu=_target(given))
    record_for(jobs, trace=given.trace, quiet=given.quiet)
    _require_closed_form(jobs)
    replays = Replays.ALL if given.verbose or len(jobs) <= FEW_CASES else Replays.DECISIVE
    records = []
    with working("estimating", len(jobs), given.quiet) as done:
        for job in jobs:
            records.append(predict(job, given.gpus_per_node, Allocator(given.expandable_segments), replays))
            done(len(records))
    if given.calibrate is not None:
        records = _calibrated(records, given.calibrate)
    accounts = {
        job.case: textbook(record.parameters, job.case.zero_stage, job.case.world_size, job.recipe)
        for job, record in zip(jobs, records, strict=True)
        if record.parameters is not None
    }
    trained, origins = recorded(jobs[0].profile), request.resolved.origins
    more = {
        "settings": settings(trained, origins),
        "refused": refused,
        "textbook": [{"case": case, "bytes": account} for case, account in accounts.items()],
    }
    run = finished_run(f"estimate {request.profile.name}", records, trained, origins)
    return of_run(run, more, notes=request.notes)


def _calibrated(records: list[MemoryRecord], path: Path) -> list[MemoryRecord]:
    """The records with the step times that the measured cases of a run tell."""
    from bf16prof.closed_form.calibration import calibrate

    run = load(path)
    fitted = calibrate(str(path), run.records)
    return [fitted.calibrated(record) for record in records]


def _require_closed_form(jobs: list[Job]) -> None:
    """Raise `Refused` for the first job without a closed form: a dry run knows what no formula
    does."""
    from bf16prof.closed_form.gap import closed_form_gap

    for job in jobs:
        if gap := closed_form_gap(job):
            raise Refused(f"{job.case.label}: no closed form: {gap}", hint="bf16prof simulate with the same flags runs the real engine dry")


def _show(run: Run, refused: Sequence[Refusal], accounts: dict[Case, dict[str, int]], verbose: bool) -> None:
    from bf16prof.reports.console import breakdown, estimate_grid, grid_width, holders, make_console, outcome, refusals

    console, records = make_console(), run.records
    if len(records) == 1 and not refused and not verbose:
        outcome([run], console)
        holders(records[0], console)
        return
    if not verbose and console.width < grid_width(records):
        outcome([run], console)
        refusals(refused, console)
        return
    estimate_grid(records, refused, console, textbook=accounts if verbose or len(records) <= FEW_CASES else None)
    for record in records if verbose else ():
        breakdown(record, console)
