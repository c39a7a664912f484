"""`bf16prof simulate`: the real DeepSpeed engine on fake tensors, at any scale, with no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bf16prof.cases import Refusal
from bf16prof.commands import options as o
from bf16prof.commands.output import check_files, check_path, finished_run, hint, print_json, show_settings, write_files
from bf16prof.commands.request import read_request, select
from bf16prof.errors import InputError
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.schema import Profile
from bf16prof.records import Device, MemoryRecord, Phase
from bf16prof.reports.asked import settings


def simulate(
    context: typer.Context,
    profile: o.ProfileOption = o.DEFAULT_PROFILE,
    zero: o.ZeroOption = "3",
    gpus: o.GpusOption = "4",
    recipe: o.RecipeOption = "bf16-fp32-master,bf16-full-autocast",
    gpu: o.GpuOption = o.DEFAULT_GPU,
    device: o.DeviceOption = Device.GPU,
    offload: o.OffloadOption = None,
    hf_config: o.HfConfigOption = None,
    model: o.ModelOption = None,
    ds_config: o.DsConfigOption = None,
    sequence_length: o.SequenceOption = None,
    micro_batch_size: o.MicroBatchOption = None,
    gradient_accumulation_steps: o.AccumulationOption = None,
    activation_checkpointing: o.CheckpointingOption = None,
    set_: o.SetOption = None,
    expandable_segments: o.ExpandableOption = False,
    snapshot: Annotated[
        Path | None,
        typer.Option("--snapshot", metavar="FILE", help="Write a memory snapshot for pytorch.org/memory_viz.", rich_help_panel=o.OUTPUT),
    ] = None,
    json_: o.JsonOption = False,
    output: o.FilesOption = None,
    force: o.ForceOption = False,
    verbose: o.VerboseOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Dry-run the real DeepSpeed engine on fake tensors, as one rank of a job of any size, and record every byte it would hold."""
    from bf16prof.commands.progress import SimulationProgress
    from bf16prof.estimate.predict import predictions, with_work
    from bf16prof.measure.accelerator import require_model_library, require_optimizer_libraries, require_packages
    from bf16prof.simulate.runner import Failed, Options, check, outcomes

    check_files(output, force)
    check_path("--snapshot", snapshot, force)
    require_packages("simulating")
    request = read_request(context)
    target = find_gpu(gpu) if device is Device.GPU else None
    require_model_library(request.profile.model)
    jobs, refused = select(request, gpus=gpus, device=device, gpu=target)
    require_optimizer_libraries(jobs)
    if snapshot is not None and len(jobs) != 1:
        raise InputError(f"--snapshot {snapshot}: a snapshot is of one case, these are {len(jobs)}", hint="name one stage, size and recipe")
    with SimulationProgress(jobs, quiet) as progress:
        found = outcomes(jobs, progress, Options(expandable_segments, snapshot))
    failures = [outcome for outcome in found if isinstance(outcome, Failed)]
    records = [outcome for outcome in found if isinstance(outcome, MemoryRecord)]
    if not records:
        check(failures, len(jobs))
    refused = [*refused, *(Refusal(failed.job.case, failed.error.message) for failed in failures)]
    jobs = [job for job, outcome in zip(jobs, found, strict=True) if isinstance(outcome, MemoryRecord)]
    both = with_work([*records, *predictions(jobs)])
    records = both[: len(records)]
    trained, origins = jobs[0].profile.model_dump(mode="json"), request.resolved.origins
    result = finished_run(f"simulate {request.profile.name}", both, trained, origins)
    write_files(output, [result], refused=refused)
    if json_:
        print_json(records, settings=settings(trained, origins), refused=refused)
        check(failures, len(found))
        return
    from bf16prof.reports.console import breakdown, make_console, reconciliation

    console = make_console()
    reconciliation([result], console)
    for record in records if verbose or len(records) == 1 else ():
        breakdown(record, console)
    if verbose:
        show_settings(trained, origins)
    for failed in failures:
        hint(f"left out: {failed.reason}", quiet)
    hint(_next(records, request.profile), quiet)
    check(failures, len(found))


def _next(records: Sequence[MemoryRecord], profile: Profile) -> str:
    """The command to type next."""
    in_init = any(r.out_of_memory is not None and r.out_of_memory.phase is Phase.INIT and r.case.zero_stage == 3 for r in records)
    if in_init and not profile.workload.zero_init:
        return "next: the same with --set workload.zero_init=true   (ZeRO-3 then never has the whole model on the device)"
    return "next: bf16prof measure --simulate   (the same on real ranks, where there are any)"
