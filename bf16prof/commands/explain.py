"""`bf16prof explain`: an out-of-memory message or a log, put in words: what ran out where, what was
predicted, and what would fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bf16prof.commands.flags import Asked, ExplainFlags, takes
from bf16prof.commands.imported import Subject, record_of, subject_of
from bf16prof.commands.output import hint, told_run
from bf16prof.documents import json_text, raw_document
from bf16prof.explanations import Explanation, Prediction
from bf16prof.records import MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.vocabulary import Phase

if TYPE_CHECKING:
    from bf16prof.imports.files import Sources
    from bf16prof.imports.out_of_memory import Message

MOST_CHANGES = 3
"""So many ways out are named."""


@takes(ExplainFlags)
def explain(asked: Asked[ExplainFlags]) -> None:
    """Say what an out-of-memory message means: which phase, what held the memory, and whether
    fragmentation was to blame.

    With a model, its DeepSpeed JSON and the number of GPUs (or what the log says of them) it also
    says what was predicted for that phase, how far off that is, and which changes would fit.
    """
    given = asked.flags
    sources = _sources(given.files)
    subject, why_not = _subject(asked, sources)
    found = _of_the_message(sources)
    records: list[MemoryRecord] = []
    if subject is not None:
        for text in subject.told:
            hint(text, given.quiet)
        predicted, gap = _predicted(subject)
        records = [record_of(sources, subject, predicted, given.gpu), *predicted]
        found = _with_prediction(found, subject, records, sources, why_not=gap)
    else:
        found = dataclasses.replace(found, why_not_predicted=why_not)
    if given.json_:
        said = settings(subject.profile, subject.origins) if subject else {}
        typer.echo(json_text(raw_document(tuple(records), settings=said, explanation=found)))
    else:
        _show(found, sources, records, given.quiet)


def _sources(files: list[str]) -> Sources:
    """What the files say; an argument that is no file and reads like a message is one."""
    from bf16prof.imports.files import read_files, read_message

    if len(files) == 1 and not _is_file(files[0]) and "memory" in files[0].lower() and " " in files[0].strip():
        return read_message(files[0])
    return read_files([Path(name) for name in files])


def _is_file(name: str) -> bool:
    try:
        return name == "-" or Path(name).exists()
    except (OSError, ValueError):
        return False


def _subject(asked: Asked[ExplainFlags], sources: Sources) -> tuple[Subject | None, str]:
    """What the run was of, as far as somebody says it, or why there is no prediction.

    Nothing of it is needed for the message itself, so what is missing is no error; what is wrong is
    one.
    """
    given = asked.flags
    if not (given.profile or given.hf_config or given.model):
        return (
            None,
            "name the model (--profile, --hf-config or --model), with --ds-config and --gpus, to see what was predicted and what fits",
        )
    return subject_of(asked, sources, [Path(name) for name in given.files if _is_file(name)]), ""


def _predicted(subject: Subject) -> tuple[list[MemoryRecord], str]:
    from bf16prof.closed_form.gap import closed_form_gap
    from bf16prof.closed_form.predict import predictions

    why_not = subject.why_not if subject.job is None else closed_form_gap(subject.job)
    return ([], why_not or "") if subject.job is None or why_not else (predictions([subject.job]), "")


def _of_the_message(sources: Sources) -> Explanation:
    """What the log and its message say by themselves."""
    from bf16prof.imports.arithmetic import advice, amounts

    message = sources.failed
    if message is None:
        return Explanation(sources.failure)
    place = message.place
    return Explanation(sources.failure, place.phase, place.evidence, message.rank, message.gpu, amounts(message), advice(message))


OF_AN_EVALUATION = "what an evaluation holds depends on its batch and on what is kept: bf16prof simulate --eval-batch-size N runs it"


def _with_prediction(found: Explanation, subject: Subject, records: list[MemoryRecord], sources: Sources, *, why_not: str) -> Explanation:
    """The explanation with what was predicted of the phase, and with what would fit."""
    from bf16prof.planning.from_job import changes_of, judge_of

    job = subject.job
    if job is None or job.gpu is None or len(records) < 2:
        return dataclasses.replace(found, why_not_predicted=why_not)
    if found.phase is Phase.EVAL:
        return dataclasses.replace(found, why_not_predicted=OF_AN_EVALUATION)
    judge, start = judge_of(job, job.gpu)
    prediction = _prediction(records[1], sources.failed, found)
    if start is None:
        return dataclasses.replace(found, prediction=prediction, why_not_predicted=next(iter(judge.left_out), ""))
    fits, saves = changes_of(judge, start, prediction.missing_bytes if prediction else 0)
    return dataclasses.replace(
        found,
        prediction=prediction,
        judged_on=job.gpu.id,
        start=start.plan,
        fits_with=tuple(fits[:MOST_CHANGES]),
        saves=tuple(saves[:MOST_CHANGES]),
    )


def _prediction(record: MemoryRecord, message: Message | None, found: Explanation) -> Prediction | None:
    from bf16prof.imports.arithmetic import room

    phases = {phase: memory.peak_bytes for phase, memory in record.phases.items() if memory.peak_bytes is not None}
    peak = phases.get(found.phase) if found.phase else record.run_peak_allocated_bytes
    if peak is None:
        return None
    needed = message.needed if message else None
    return Prediction(
        record.case.label,
        found.phase,
        peak,
        needed.bytes if needed else None,
        needed.rounding if needed else 0,
        room(message) if message else None,
        phases,
    )


def _show(found: Explanation, sources: Sources, records: list[MemoryRecord], quiet: bool) -> None:
    """Print the explanation; of a log without a message what it says, beside the prediction where
    there is one."""
    from bf16prof.imports.merge import merged
    from bf16prof.reports.console import explanation_view, make_console, reconciliation

    console = make_console()
    proved = [] if found.failure else [(n, r.bytes, r.is_floor) for n, r in merged(sources.findings)[0].items()]
    explanation_view(found, proved, console)
    if records and not found.failure:
        reconciliation([told_run(records[0].case.profile, records, {}, {})], console)
    notes = [] if found.failure else [note for finding in sources.findings for note in finding.notes]
    for text in [*(f"read {read}" for read in sources.files), *notes]:
        hint(text, quiet)
