"""`bf16prof simulate`: the real DeepSpeed engine on fake tensors, at any scale, with no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bf16prof.cases import Job, Refusal
from bf16prof.commands import options as o
from bf16prof.commands.literal import script_words
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
from bf16prof.commands.request import read_request, say_notes, select
from bf16prof.commands.simulate_script import refuse_script_flags, simulate_script
from bf16prof.errors import Bf16profError, InputError
from bf16prof.profiles.gpus import GPUS_PER_NODE, find_gpu
from bf16prof.records import Device, MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.runs import Run
from bf16prof.verdict import Allocator


def simulate(
    context: typer.Context,
    subject: o.SubjectArgument = None,
    profile: o.ProfileOption = o.DEFAULT_PROFILE,
    zero: o.ZeroOption = "3",
    gpus: o.GpusOption = "4",
    recipe: o.RecipeOption = "bf16-fp32-master,bf16-full-autocast",
    gpu: o.GpuOption = o.DEFAULT_GPU,
    device: o.DeviceOption = Device.GPU,
    gpus_per_node: o.PerNodeOption = GPUS_PER_NODE,
    offload: o.OffloadOption = None,
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
    steps: o.ScriptStepsOption = 3,
    rank: o.ScriptRankOption = 0,
    timeout: o.ScriptTimeoutOption = 900,
    expandable_segments: o.ExpandableOption = False,
    snapshot: Annotated[
        Path | None,
        typer.Option("--snapshot", metavar="FILE", help="Write a memory snapshot for pytorch.org/memory_viz.", rich_help_panel=o.OUTPUT),
    ] = None,
    json_: o.JsonOption = False,
    output: o.FilesOption = None,
    force: o.ForceOption = False,
    fail_unless_fits: o.FailUnlessFitsOption = False,
    verbose: o.VerboseOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Dry-run the real DeepSpeed engine on fake tensors, as one rank of a job of any size, and record every byte it would hold.

    With -- SCRIPT ARGUMENTS, or -- -m MODULE ARGUMENTS, the engine is that of your own training script, which runs as it is.
    """
    from bf16prof.commands.progress import SimulationProgress
    from bf16prof.estimate.predict import predictions, with_work
    from bf16prof.measure.accelerator import require_model_library, require_optimizer_libraries, require_packages
    from bf16prof.simulate.runner import DryRunFailed, DryRunRefused, Options
    from bf16prof.simulate.runner import simulate as run

    check_outputs(context.params)
    if (words := script_words(context)) is not None:
        simulate_script(context, words)
        return
    refuse_script_flags(context)
    check_judged_device(fail_unless_fits, device)
    require_packages("simulating")
    request = read_request(context)
    target = find_gpu(gpu) if device is Device.GPU else None
    require_model_library(request.profile.model)
    jobs, refused = select(request, gpus=gpus, device=device, gpu=target)
    require_optimizer_libraries(jobs)
    if snapshot is not None and len(jobs) != 1:
        raise InputError(f"--snapshot {snapshot}: a snapshot is of one case, these are {len(jobs)}", hint="name one stage, size and recipe")
    say_notes(request, quiet)
    failed: Bf16profError | None = None
    with SimulationProgress(jobs, quiet) as progress:
        try:
            records = run(jobs, progress, Options(expandable_segments, snapshot, force))
        except (DryRunFailed, DryRunRefused) as error:  # the others are shown all the same
            if not error.records:
                raise
            refused = [*refused, *(Refusal(jobs[index].case, reason) for index, reason in error.reasons.items())]
            failed, records, jobs = error, list(error.records.values()), [jobs[index] for index in error.records]
        records = _with_way_out(jobs, records, lambda others: run(others, None, Options(expandable_segments)))
    records = with_host_per_node(records, gpus_per_node)
    both = with_work([*records, *predictions(jobs, gpus_per_node, Allocator(expandable_segments))])
    records = both[: len(records)]
    trained, origins = jobs[0].profile.model_dump(mode="json"), request.resolved.origins
    result = finished_run(f"simulate {request.profile.name}", both, trained, origins)
    more: dict[str, Any] = {"settings": settings(trained, origins), "refused": refused}
    write_files(output, [result], force=force, **more)
    if json_:
        print_json(records, **more)
    else:
        _show(result, records, verbose)
        if not verbose and len(records) > 1:
            hint_caveats(target, quiet)
    if failed is not None:
        raise failed
    require_fit(records, fail_unless_fits)
    hint(_next(records), quiet or json_)


def _show(result: Run, records: Sequence[MemoryRecord], verbose: bool) -> None:
    from bf16prof.reports.console import breakdown, make_console, reconciliation

    console = make_console()
    reconciliation([result], console)
    for record in records if verbose or len(records) == 1 else ():
        breakdown(record, console)
    if verbose:
        show_settings(result.manifest.profile, result.manifest.origins)


def _with_way_out(
    jobs: Sequence[Job], records: Sequence[MemoryRecord], run: Callable[[Sequence[Job]], Sequence[MemoryRecord]]
) -> list[MemoryRecord]:
    """The records; where only init does not fit, each with the peak of the same job built inside `zero.Init`, which is run for it."""
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
    return training <= limit < whole and job.case.zero_stage == 3 and not job.is_inside_zero_init


def _inside_zero_init(job: Job) -> Job:
    workload = job.profile.workload.model_copy(update={"zero_init": True})
    return dataclasses.replace(job, profile=job.profile.model_copy(update={"workload": workload}))


def _next(records: Sequence[MemoryRecord]) -> str:
    """The command to type next."""
    if any(record.inside_zero_init_bytes is not None for record in records):
        return "next: the same with --zero-init   (ZeRO-3 then never has the whole model on the device)"
    return "next: bf16prof measure --simulate   (the same on real ranks, where there are any)"
