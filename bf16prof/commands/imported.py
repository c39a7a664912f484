"""What an imported run is of: its case by flags, a DeepSpeed JSON and the log itself, and its
record with the estimate beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bf16prof.cases import Job, check_sizes, offload_of
from bf16prof.commands import options as o
from bf16prof.commands.flags import Asked, LogFlags
from bf16prof.commands.from_log import filled_from_log
from bf16prof.commands.output import hint
from bf16prof.commands.request import read_request, select
from bf16prof.engine.workload import workload_of
from bf16prof.errors import InputError, Refused
from bf16prof.profiles.ds_config import ds_case
from bf16prof.profiles.gpus import Gpu, all_gpus, find_gpu, gpu_named
from bf16prof.profiles.identity import recorded
from bf16prof.profiles.recipes import find_recipe
from bf16prof.records import Case, MemoryRecord
from bf16prof.vocabulary import Device, Offload

if TYPE_CHECKING:
    from bf16prof.imports.files import Sources
    from bf16prof.imports.record import Batch


JSON_OF_THE_LOG = "the log's DeepSpeed JSON"


@dataclass(frozen=True)
class Subject:
    """What a run was of: its case, and where the user describes the training, the job and its
    profile."""

    case: Case
    job: Job | None = None
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    why_not: str = "no --profile and no model was named"
    told: tuple[str, ...] = ()
    """What was taken from the log, and what of it contradicts a flag."""


def require_logs(files: Sequence[Path]) -> None:
    """Raise `InputError` for a model in the place of a log: other commands take a model there."""
    from bf16prof.profiles.shipped import preset_files, preset_ids

    models = {*preset_files(), *(name for names in preset_ids().values() for name in names)}
    for path in files:
        if not path.exists() and str(path) in models:
            raise InputError(f"there is no log called {path}", hint=f"the model that was trained: --model {path}")


def subject_of(asked: Asked[LogFlags], sources: Sources, files: Sequence[Path]) -> Subject:
    """What the user, and the log itself, say of a run. Raises `InputError` naming what neither says
    of its case.

    A DeepSpeed JSON that a log prints and that cannot be read here is left out, and that is said.
    """
    is_ours = asked.flags.ds_config is None
    with filled_from_log(asked, sources) as (filled, told):
        path = filled.flags.ds_config

        def named(text: str) -> str:
            return text.replace(str(path), JSON_OF_THE_LOG) if is_ours and path is not None else text

        try:
            subject = _subject(filled, sources, files)
            origins = {key: named(origin) for key, origin in subject.origins.items()}
            return dataclasses.replace(subject, told=(*told, *map(named, subject.told)), origins=origins)
        except InputError as error:
            if not is_ours or sources.said("deepspeed") is None:
                raise
            reason = named(error.message)
    with filled_from_log(asked, sources, without_json=True) as (filled, told):
        left_out = f"the DeepSpeed JSON in the log is not used: {reason}"
        return dataclasses.replace(_subject(filled, sources, files), told=(*told, left_out))


def _subject(asked: Asked[LogFlags], sources: Sources, files: Sequence[Path]) -> Subject:
    given = asked.flags
    _require_case(given, sources)
    if not (given.profile or given.hf_config or given.model):
        return Subject(_case(given, sources, _name(files), given.offload or Offload.NONE))
    request = read_request(asked)
    told = tuple(f"note: {note}" for note in request.notes)
    given = dataclasses.replace(given, zero=request.zero, recipe=request.recipe)
    case = _case(given, sources, request.profile.name, given.offload or offload_of(request.profile))
    try:
        (job,), _ = select(request, gpus=given.gpus, device=Device.GPU, gpu=_gpu(given.gpu, sources))
    except Refused as refusal:
        return Subject(case, None, recorded(request.profile), request.resolved.origins, refusal.message, told)
    return Subject(job.case, job, recorded(job.profile), request.resolved.origins, told=told)


def _name(files: Sequence[Path]) -> str:
    """What a run is called of which nobody says what it trained: its first file."""
    return files[0].stem.encode(errors="backslashreplace").decode() if files else "log"


def _require_case(given: LogFlags, sources: Sources) -> None:
    """Raise `InputError` naming what neither the flags nor a DeepSpeed JSON say of the case; logs
    do not say it."""
    said = {"--gpus": given.gpus, "--zero": given.zero or given.ds_config, "--recipe": given.recipe or given.ds_config}
    missing = [flag for flag, value in said.items() if not value]
    if missing:
        config = next((f.config for f in sources.findings if f.config), None)
        named = f" (the log names {config})" if config else ""
        raise InputError(
            f"what was logged does not say which case it is: add {', '.join(missing)}",
            hint=f"the run's DeepSpeed JSON{named} says stage and precision: --ds-config FILE; bf16prof explain FILE shows what a log says",
        )


def _case(given: LogFlags, sources: Sources, name: str, offload: Offload) -> Case:
    """The case that flags and a DeepSpeed JSON name. Raises `InputError` unless each names one,
    with as many ranks as speak in a log."""
    zero, recipe = given.zero, given.recipe
    if given.ds_config and not (zero and recipe):
        stage, said = ds_case(given.ds_config, precision=not recipe)
        zero, recipe = zero or str(stage), recipe or said
    stages, sizes, recipes = o.numbers("--zero", zero), o.numbers("--gpus", given.gpus), o.words(recipe)
    for flag, values in (("--zero", stages), ("--gpus", sizes), ("--recipe", recipes)):
        if len(values) != 1:
            raise InputError(f"{flag}: a run is of one case; these are {len(values)}")
    check_sizes(stages, sizes)
    ranks = max(finding.ranks for finding in sources.findings)
    if ranks > sizes[0]:
        raise InputError(f"--gpus {sizes[0]}: the log speaks of rank {ranks - 1}")
    return Case(name, stages[0], sizes[0], find_recipe(recipes[0]).id, offload)


def _gpu(id_: str, sources: Sources) -> Gpu:
    """The GPU that the user names; else the one that the log names, if the table knows it, or whose
    memory an out-of-memory message says; else the default."""
    if id_:
        return find_gpu(id_)
    logged = next((f.facts["gpu"] for f in sources.findings if f.facts.get("gpu")), None)
    total = sources.failed.bytes("total") if sources.failed else None
    return gpu_named(logged) or _with_memory(total) or find_gpu(o.DEFAULT_GPU)


SAME_MEMORY = 0.015
"""GPUs are of one size when their memory differs by no more than this share: drivers report a
little less or more of one model."""


def _with_memory(total: int | None) -> Gpu | None:
    """The default GPU if it has so much memory, else the only one of the table that has, else one
    of which only that is known."""
    if total is None:
        return None
    same = {gpu.id: gpu for gpu in all_gpus().values() if abs(gpu.memory_bytes - total) <= SAME_MEMORY * total}
    default = same.get(o.DEFAULT_GPU)
    only = next(iter(same.values())) if len(same) == 1 else None
    if default or only:
        return default or only
    with contextlib.suppress(InputError):  # a number that no GPU has
        return find_gpu(f"{total / 2**30:.2f}GiB")
    return None


def predictions_of(subject: Subject, quiet: bool) -> list[MemoryRecord]:
    """The estimate of the same case; none, with the reason said, where there is no closed form or
    nobody described the training."""
    from bf16prof.closed_form.gap import closed_form_gap
    from bf16prof.closed_form.predict import predictions

    why_not = subject.why_not if subject.job is None else closed_form_gap(subject.job)
    if subject.job is None or why_not:
        hint(f"no estimate beside it: {why_not}", quiet)
        return []
    return predictions([subject.job])


def record_of(sources: Sources, subject: Subject, predicted: list[MemoryRecord], gpu: str) -> MemoryRecord:
    """The record of what was logged, with the workload that the user describes. `gpu`: the one that
    they name."""
    from bf16prof.imports.record import imported_record

    notes = [*(f"read {read}" for read in sources.files), *subject.told]
    record = imported_record(subject.case, sources.findings, gpu=gpu or None, notes=notes, batch=_batch(subject))
    if subject.job is not None:
        record = dataclasses.replace(record, workload=workload_of(subject.job))
    expected = {prediction.parameters for prediction in predicted}
    if record.parameters is None or not expected or record.parameters in expected:
        return record
    warning = f"the log has {record.parameters:,} parameters, the profile {next(iter(expected)):,}: this is another model"
    return dataclasses.replace(record, notes=(*record.notes, warning))


def _batch(subject: Subject) -> Batch | None:
    """The batch of the job that the user describes; `None` leaves it to the log."""
    from bf16prof.imports.record import Batch

    if subject.job is None:
        return None
    workload, ranks = subject.job.profile.workload, subject.case.world_size
    steps = workload.gradient_accumulation_steps
    return Batch(workload.micro_batch_size * steps * ranks, steps)
