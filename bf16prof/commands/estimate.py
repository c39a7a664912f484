"""`bf16prof estimate`: the closed form, over a grid of ZeRO stages, GPU counts and recipes."""

from __future__ import annotations

from pathlib import Path

import typer

from bf16prof.cases import Job, Refusal
from bf16prof.commands import options as o
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
from bf16prof.commands.request import read_request, say_notes, select
from bf16prof.errors import Refused
from bf16prof.profiles.gpus import GPUS_PER_NODE, find_gpu
from bf16prof.records import Case, Device, MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.runs import load
from bf16prof.verdict import Allocator, Replays

FEW_CASES = 12
"""Up to this many cases the textbook accountings are shown beside ours, which would drown a larger grid, and the allocator is replayed
for all of them, not only where the verdict turns on it (`-v`: for any number)."""


def estimate(
    context: typer.Context,
    subject: o.SubjectArgument = None,
    profile: o.ProfileOption = o.DEFAULT_PROFILE,
    zero: o.ZeroOption = "0,1,2,3",
    gpus: o.GpusOption = "1,2,4,8,16,32,64,128",
    recipe: o.RecipeOption = "",
    gpu: o.GpuOption = o.DEFAULT_GPU,
    device: o.DeviceOption = Device.GPU,
    gpus_per_node: o.PerNodeOption = GPUS_PER_NODE,
    expandable_segments: o.ExpandableOption = False,
    offload: o.OffloadOption = None,
    calibrate: o.CalibrateOption = None,
    hf_config: o.HfConfigOption = None,
    download: o.DownloadOption = False,
    model: o.ModelOption = None,
    ds_config: o.DsConfigOption = None,
    training_args: o.TrainingArgsOption = None,
    optim: o.OptimOption = None,
    sequence_length: o.SequenceOption = None,
    micro_batch_size: o.MicroBatchOption = None,
    gradient_accumulation_steps: o.AccumulationOption = None,
    activation_checkpointing: o.CheckpointingOption = None,
    zero_init: o.ZeroInitOption = None,
    set_: o.SetOption = None,
    trace: o.TraceOption = True,
    json_: o.JsonOption = False,
    output: o.FilesOption = None,
    force: o.ForceOption = False,
    fail_unless_fits: o.FailUnlessFitsOption = False,
    verbose: o.VerboseOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Predict the memory of one GPU in closed form: every persistent byte, in milliseconds, without torch.

    What a step has to compute, to send and to update comes with it (-v), and the time below which no such GPU can do it.
    """
    from bf16prof.estimate.predict import predict
    from bf16prof.estimate.textbook import textbook

    check_outputs(context.params)
    check_judged_device(fail_unless_fits, device)
    request = read_request(context)
    target = find_gpu(gpu) if device is Device.GPU else None
    jobs, refused = select(request, gpus=gpus, device=device, gpu=target)
    record_for(jobs, trace=trace, quiet=quiet)
    _require_closed_form(jobs)
    say_notes(request, quiet)
    replays = Replays.ALL if verbose or len(jobs) <= FEW_CASES else Replays.DECISIVE
    records = [predict(job, gpus_per_node, Allocator(expandable_segments), replays) for job in jobs]
    if calibrate is not None:
        records = _calibrated(records, calibrate)
    accounts = {
        job.case: textbook(record.parameters, job.case.zero_stage, job.case.world_size, job.recipe)
        for job, record in zip(jobs, records, strict=True)
        if record.parameters is not None
    }
    trained, origins = jobs[0].profile.model_dump(mode="json"), request.resolved.origins
    more = {
        "settings": settings(trained, origins),
        "refused": refused,
        "textbook": [{"case": case, "bytes": account} for case, account in accounts.items()],
    }
    write_files(output, [finished_run(f"estimate {request.profile.name}", records, trained, origins)], force=force, **more)
    if json_:
        print_json(records, **more)
    else:
        _show(records, refused, accounts, verbose)
        if verbose:
            show_settings(trained, origins)
        elif len(records) > 1:
            hint_caveats(target, quiet)
    require_fit(records, fail_unless_fits)
    if json_:
        return
    hint(f"next: bf16prof measure --profile cpu-demo   (real DeepSpeed ranks; this table's profile is {request.profile.name})", quiet)


def _calibrated(records: list[MemoryRecord], path: Path) -> list[MemoryRecord]:
    """The records with the step times that the measured cases of a run tell."""
    from bf16prof.estimate.calibration import calibrate

    run = load(path)
    fitted = calibrate(str(path), run.records)
    return [fitted.calibrated(record) for record in records]


def _require_closed_form(jobs: list[Job]) -> None:
    """Raise `Refused` for the first job without a closed form: a dry run knows what no formula does."""
    from bf16prof.estimate.gap import closed_form_gap

    for job in jobs:
        if gap := closed_form_gap(job):
            raise Refused(f"{job.case.label}: no closed form: {gap}", hint="bf16prof simulate with the same flags runs the real engine dry")


def _show(records: list[MemoryRecord], refused: list[Refusal], accounts: dict[Case, dict[str, int]], verbose: bool) -> None:
    from bf16prof.reports.console import breakdown, estimate_grid, make_console

    console = make_console()
    estimate_grid(records, refused, console, textbook=accounts if verbose or len(records) <= FEW_CASES else None)
    if verbose or len(records) == 1:
        for record in records:
            breakdown(record, console)
