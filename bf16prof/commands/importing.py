"""`bf16prof import`: what others logged of one run, joined, with the estimate of the same case beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from bf16prof.claims import claimed
from bf16prof.commands import options as o
from bf16prof.commands.imported import predictions_of, record_of, subject_of
from bf16prof.commands.output import check_outputs, finished_run, hint, print_json, report_hints, write_files, write_report
from bf16prof.reconcile import check_tolerance, reconcile
from bf16prof.reports.asked import settings
from bf16prof.runs import Run, Status, save, save_losses


def import_(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What was logged of one run: all that there is of it.")],
    profile: o.ProfileOption = "",
    zero: o.ZeroOption = "",
    gpus: o.GpusOption = "",
    recipe: o.RecipeOption = "",
    gpu: o.GpuOption = "",
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
    output_dir: o.OutputDirOption = None,
    json_: o.JsonOption = False,
    output: o.FilesOption = None,
    force: o.ForceOption = False,
    fail_over: o.TolerateOption = None,
    verbose: o.VerboseOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Turn what others logged of a run on GPUs into a run like one's own.

    Recognised by their content: what DeepSpeed prints (throughput, memory_breakdown, wall_clock_breakdown, its configuration), torch's
    out-of-memory messages and memory snapshots, what the Hugging Face Trainer prints and leaves, nvidia-smi, CSV files of step and loss,
    and the stdout of DeepSpeed's bf16 example; packed with gzip or not. With a profile, or a model, the estimate stands beside it.
    """
    from bf16prof.imports.files import read_files

    check_outputs(context.params)
    tolerance = None if fail_over is None else o.percentage(fail_over)
    sources = read_files(files)
    subject = subject_of(context, sources)
    for text in subject.told if json_ else ():  # else they are among the notes
        hint(text, quiet)
    predicted = predictions_of(subject, quiet)
    records = [record_of(sources, subject, predicted, context.params["gpu"]), *predicted]
    status = Status.OOM if sources.failure else Status.FINISHED
    name = subject.case.profile
    result = finished_run(name, records, subject.profile, subject.origins, status=status, message=sources.failure)
    with claimed(output_dir, name, force=force, beside=output or ()) as claim:
        run = dataclasses.replace(result, path=claim.path)
        claim.clear()
        save(run)
        save_losses(run)
        write_report(run)
    comparisons = reconcile(run.records)
    said = settings(subject.profile, subject.origins)
    more: dict[str, Any] = {"settings": said, "comparisons": comparisons, "run": str(run.path)}
    write_files(output, [run], force=force, **more)
    if json_:
        print_json(run.records, **more)
    else:
        _show(run, verbose, quiet)
        if sources.failure:
            hint(f"the run did not finish: {sources.failure}; bf16prof explain says more", False)
        report_hints(run.path, quiet)
    if tolerance is not None:
        check_tolerance(comparisons, tolerance)


def _show(run: Run, verbose: bool, quiet: bool) -> None:
    from bf16prof.reports.console import breakdown, make_console, reconciliation

    console = make_console()
    reconciliation([run], console)
    for record in run.records if verbose else ():
        breakdown(record, console)
    for note in run.records[0].notes if not verbose else ():
        hint(note, quiet)
