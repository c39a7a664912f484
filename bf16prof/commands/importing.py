"""`bf16prof import`: what others logged of one run, joined, with the estimate of the same case beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bf16prof.cases import Job, check_sizes, offload_of
from bf16prof.commands import options as o
from bf16prof.commands.output import check_files, finished_run, hint, new_folder, print_json, report_hints, write_files, write_report
from bf16prof.commands.request import read_request, select
from bf16prof.engine.workload import workload_of
from bf16prof.errors import InputError, Refused
from bf16prof.profiles.ds_config import read_ds_config
from bf16prof.profiles.gpus import Gpu, find_gpu, gpu_named
from bf16prof.profiles.recipes import find_recipe
from bf16prof.reconcile import check_tolerance, reconcile
from bf16prof.records import Case, Device, MemoryRecord, Offload
from bf16prof.reports.asked import settings
from bf16prof.runs import Run, create, save, save_losses

if TYPE_CHECKING:
    from bf16prof.imports.files import Sources


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

    Recognised by their content: the stdout of DeepSpeed's bf16 example, CSV files of step and loss, what DeepSpeed prints under
    memory_breakdown and wall_clock_breakdown, memory snapshots of PyTorch, and the CSV of nvidia-smi --query-gpu. With a profile, or a
    model, the estimate stands beside it.
    """
    from bf16prof.imports.files import read_files

    check_files(output, force)
    tolerance = None if fail_over is None else o.percentage(fail_over)
    sources = read_files(files)
    subject = _subject(context, sources)
    predicted = _predictions(subject, quiet)
    records = [_record(sources, subject, predicted, context.params["gpu"]), *predicted]
    folder = output_dir or new_folder(subject.case.profile)
    create(folder, force=force)
    result = finished_run(subject.case.profile, records, subject.profile, subject.origins)
    run = dataclasses.replace(result, path=folder)
    save(run)
    save_losses(run)
    write_report(run)
    comparisons = reconcile(run.records)
    said = settings(subject.profile, subject.origins)
    more: dict[str, Any] = {"settings": said, "comparisons": comparisons, "run": str(folder)}
    write_files(output, [run], **more)
    if json_:
        print_json(run.records, **more)
    else:
        _show(run, verbose, quiet)
        report_hints(folder, quiet)
    if tolerance is not None:
        check_tolerance(comparisons, tolerance)


@dataclass(frozen=True)
class _Subject:
    """What a run was of: its case, and where the user describes the training, the job and its profile."""

    case: Case
    job: Job | None = None
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    why_not: str = "no --profile and no model was named"


def _subject(context: typer.Context, sources: Sources) -> _Subject:
    given = context.params
    _require_case(given, sources)
    if not (given["profile"] or given["hf_config"] or given["model"]):
        name = given["files"][0].stem.encode(errors="backslashreplace").decode()
        return _Subject(_case(given, sources, name, given["offload"] or Offload.NONE))
    request = read_request(context)
    given |= {"zero": request.zero, "recipe": request.recipe}
    case = _case(given, sources, request.profile.name, given["offload"] or offload_of(request.profile))
    try:
        (job,), _ = select(request, gpus=given["gpus"], device=Device.GPU, gpu=_gpu(given["gpu"], sources))
    except Refused as refusal:
        return _Subject(case, None, request.profile.model_dump(mode="json"), request.resolved.origins, refusal.message)
    return _Subject(job.case, job, job.profile.model_dump(mode="json"), request.resolved.origins)


def _require_case(given: dict[str, Any], sources: Sources) -> None:
    """Raise `InputError` naming what neither the flags nor a DeepSpeed JSON say of the case; logs do not say it."""
    said = {"--gpus": given["gpus"], "--zero": given["zero"] or given["ds_config"], "--recipe": given["recipe"] or given["ds_config"]}
    missing = [flag for flag, value in said.items() if not value]
    if missing:
        config = next((f.config for f in sources.findings if f.config), None)
        named = f" (the log names {config})" if config else ""
        raise InputError(
            f"what was logged does not say which case it is: add {', '.join(missing)}",
            hint=f"the run's DeepSpeed JSON{named} says stage and precision: --ds-config FILE",
        )


def _case(given: dict[str, Any], sources: Sources, name: str, offload: Offload) -> Case:
    """The case that flags and a DeepSpeed JSON name. Raises `InputError` unless each names one, with as many ranks as speak in a log."""
    zero, recipe = given["zero"], given["recipe"]
    if given["ds_config"] and not (zero and recipe):
        file = read_ds_config(given["ds_config"], precision=not recipe)
        zero, recipe = zero or str(file.stage), recipe or file.recipe
    stages, sizes, recipes = o.numbers("--zero", zero), o.numbers("--gpus", given["gpus"]), o.words(recipe)
    for flag, values in (("--zero", stages), ("--gpus", sizes), ("--recipe", recipes)):
        if len(values) != 1:
            raise InputError(f"{flag}: a run is of one case; these are {len(values)}")
    check_sizes(stages, sizes)
    ranks = max(finding.ranks for finding in sources.findings)
    if ranks > sizes[0]:
        raise InputError(f"--gpus {sizes[0]}: the log speaks of rank {ranks - 1}")
    return Case(name, stages[0], sizes[0], find_recipe(recipes[0]).id, offload)


def _gpu(id_: str, sources: Sources) -> Gpu:
    """The GPU that the user names; else the one that the log names, if the table knows it; else the default."""
    logged = next((f.facts["gpu"] for f in sources.findings if f.facts.get("gpu")), None)
    return find_gpu(id_) if id_ else gpu_named(logged) or find_gpu(o.DEFAULT_GPU)


def _predictions(subject: _Subject, quiet: bool) -> list[MemoryRecord]:
    from bf16prof.estimate.gap import closed_form_gap
    from bf16prof.estimate.predict import predictions

    why_not = subject.why_not if subject.job is None else closed_form_gap(subject.job)
    if subject.job is None or why_not:
        hint(f"no estimate beside it: {why_not}", quiet)
        return []
    return predictions([subject.job])


def _record(sources: Sources, subject: _Subject, predicted: list[MemoryRecord], gpu: str) -> MemoryRecord:
    from bf16prof.imports.record import imported_record

    notes = [f"read {read}" for read in sources.files]
    record = imported_record(subject.case, sources.findings, gpu=gpu or None, notes=notes)
    if subject.job is not None:
        record = dataclasses.replace(record, workload=workload_of(subject.job))
    expected = {prediction.parameters for prediction in predicted}
    if record.parameters is None or not expected or record.parameters in expected:
        return record
    warning = f"the log has {record.parameters:,} parameters, the profile {next(iter(expected)):,}: this is another model"
    return dataclasses.replace(record, notes=(*record.notes, warning))


def _show(run: Run, verbose: bool, quiet: bool) -> None:
    from bf16prof.reports.console import breakdown, make_console, reconciliation

    console = make_console()
    reconciliation([run], console)
    for record in run.records if verbose else ():
        breakdown(record, console)
    for note in run.records[0].notes if not verbose else ():
        hint(note, quiet)
