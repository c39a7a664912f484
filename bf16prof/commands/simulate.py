"""`bf16prof simulate`: the real DeepSpeed engine on fake tensors, at any scale, with no GPU."""

from __future__ import annotations

import typer

from bf16prof.commands import options as o
from bf16prof.commands.output import check_files, hint, prediction_run, print_json, write_files
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import Device


def simulate(
    context: typer.Context,
    profile: o.ProfileOption = "deepspeed-bf16-example",
    zero: o.ZeroOption = "3",
    gpus: o.GpusOption = "4",
    recipe: o.RecipeOption = "bf16-fp32-master,bf16-full-autocast",
    gpu: o.GpuOption = o.DEFAULT_GPU,
    device: o.DeviceOption = Device.GPU,
    offload: o.OffloadOption = None,
    sequence_length: o.SequenceOption = None,
    micro_batch_size: o.MicroBatchOption = None,
    gradient_accumulation_steps: o.AccumulationOption = None,
    activation_checkpointing: o.CheckpointingOption = None,
    set_: o.SetOption = None,
    json_: o.JsonOption = False,
    output: o.FilesOption = None,
    force: o.ForceOption = False,
    verbose: o.VerboseOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Dry-run the real DeepSpeed engine on fake tensors, as one rank of a job of any size, and record every byte it would hold."""
    from bf16prof.commands.progress import simulation_progress
    from bf16prof.estimate.predict import predict
    from bf16prof.measure.accelerator import require_packages
    from bf16prof.simulate.runner import simulate as run

    check_files(output, force)
    require_packages("simulating")
    resolved = o.resolve_profile(context, profile)
    target = find_gpu(gpu) if device is Device.GPU else None
    jobs, refused = o.select(resolved, zero=zero, gpus=gpus, recipe=recipe, offload=offload, device=device, gpu=target)
    with simulation_progress(len(jobs), quiet) as on_done:
        records = run(jobs, on_done)
    both = [*records, *(predict(job) for job in jobs)]
    result = prediction_run(f"simulate {resolved.profile.name}", both, resolved.profile.model_dump(mode="json"))
    write_files(output, [result], refused=refused)
    if json_:
        print_json(records, refused=refused)
        return
    from bf16prof.reports.console import breakdown, make_console, reconciliation

    console = make_console()
    reconciliation([result], console)
    for record in records if verbose else ():
        breakdown(record, console)
    hint("next: bf16prof measure --simulate   (the same on real ranks, where there are any)", quiet)
