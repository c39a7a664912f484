"""`bf16prof plan`: what fits a GPU, ranked; what to change where nothing does; the DeepSpeed JSON
of the first choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bf16prof.commands import options as o
from bf16prof.commands.again import next_command
from bf16prof.commands.flags import Asked, PlanFlags, takes
from bf16prof.commands.output import check_outputs, hint, hint_caveats, show_settings, with_host_per_node
from bf16prof.commands.recording import record_for
from bf16prof.commands.request import Request, read_request, say_notes
from bf16prof.commands.working import working
from bf16prof.documents import as_json, document
from bf16prof.errors import Bf16profError, DoesNotFit, InputError, Refused
from bf16prof.files import write_text
from bf16prof.outcome import Plans
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.identity import recorded
from bf16prof.profiles.load import Resolved
from bf16prof.profiles.recipes import DS_CONFIG, runnable_recipes
from bf16prof.profiles.schema import Profile
from bf16prof.records import MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.vocabulary import Offload

if TYPE_CHECKING:
    from rich.console import Console

    from bf16prof.cases import Job
    from bf16prof.planning.answer import Answer
    from bf16prof.planning.judge import Judge
    from bf16prof.planning.question import Question

SHOWN = 10
"""So many plans are shown without -v."""

USUAL_RECIPE = "bf16-fp32-master"
"""The one that is planned with where every choice is run dry and nobody named another."""

TRIED = 3
"""So many first choices are run dry where nobody said how many."""


@takes(PlanFlags)
def plan(asked: Asked[PlanFlags]) -> None:
    """Find what fits a GPU: ZeRO stages, recipes, micro-batches, checkpointing and offloading,
    judged by the predicted whole-run peak.

    Flags of the workload, --zero, --recipe and --offload restrict the choice; a DeepSpeed JSON's
    stage, precision and offloading do not. What the allocator reserves is replayed, and the first
    choices are run dry (--verify), so that a plan that fits has been tried. Where nothing fits,
    what to change first is the answer (exit code 0, but 2 with --write).
    """
    given = asked.flags
    check_outputs(asked.given())
    request = read_request(asked)
    found = planned(asked, request)
    answers = found.answers
    _write(found, given)
    if given.json_:
        typer.echo(found.to_json())
    else:
        from bf16prof.reports.console import make_console

        show(found, make_console(), verbose=given.verbose)
        if given.verbose:
            show_settings(recorded(request.profile), request.resolved.origins)
    _require_a_plan(answers, given.fail_unless_fits)
    if given.write is not None and answers[0].first is None:
        raise Refused(f"--write {given.write}: nothing written, for no plan fits", hint="the table says what to change first")
    hint_caveats(find_gpu(given.gpu), given.quiet)
    _hints(asked, answers, request, given.write, given.quiet)


def planned(asked: Asked[PlanFlags], request: Request) -> Plans:
    """The answer for each number of GPUs, the first choices run dry."""
    from bf16prof.closed_form.anatomy import is_written
    from bf16prof.planning.answer import answer
    from bf16prof.planning.question import by_dry_runs

    given, request = asked.flags, _without_evaluation(request)
    sizes = list(dict.fromkeys(o.numbers("--gpus", given.gpus)))
    if given.write is not None and len(sizes) != 1:
        raise InputError(
            f"--write {given.write}: a DeepSpeed JSON is of one number of GPUs, these are {len(sizes)}", hint="name one with --gpus"
        )
    _require_partitions(request.profile, o.numbers("--zero", given.zero), sizes)
    judge = _judge(given, request)
    _require_free_dimensions(given, request.profile)
    if by_dry_runs(request.profile):
        return _by_dry_runs(asked, request, judge, sizes)
    if given.search_dimensions:
        return _by_dimensions(asked, request, judge, sizes)
    asked_first = [] if is_written(request.profile) else judge.first_asked(sizes)
    record_for(asked_first, trace=given.trace, quiet=given.quiet, searches=True)
    say_notes(request, given.quiet)
    most = None if given.verbose or given.json_ or given.output else SHOWN if len(sizes) == 1 else 1
    with working("judging combinations", None, given.quiet) as judge.watch:
        answers = [answer(judge, size, most) for size in sizes]
    if wanted := _to_try(given, len(sizes)):
        answers = _tried(answers, judge, wanted, given=given)
    if any(answer.first is None for answer in answers) and _may_search(given, answers):
        answers = [_wider(answers[0], given, request)]
    name, parameters = _model(request.profile)
    line = _asked(judge, answers[0], parameters)
    theirs = request.file.content if request.file else None
    return Plans(tuple(answers), _document(answers, request, line), name, parameters, request.notes, theirs)


def _by_dry_runs(asked: Asked[PlanFlags], request: Request, judge: Judge, sizes: Sequence[int]) -> Plans:
    """The same where ranks share a batch: there is no closed form of the peaks, so every choice is
    run dry."""
    from bf16prof.planning.by_dry_run import answer_by_dry_runs

    given = asked.flags
    _require_dry_runs(given, request, judge, sizes)

    def dry_run(jobs: Sequence[Job]) -> list[MemoryRecord | None]:
        return [record and with_host_per_node([record], given.gpus_per_node)[0] for record in _dry_run(jobs, given)]

    return _plans(asked, request, judge, [answer_by_dry_runs(judge, size, dry_run) for size in sizes])


def _by_dimensions(asked: Asked[PlanFlags], request: Request, judge: Judge, sizes: Sequence[int]) -> Plans:
    """The same where somebody asks for a search of the dimensions: ranks that share nothing are one
    of its choices."""
    _require_dry_runs(asked.flags, request, judge, sizes)
    answers, reasons = [], []
    for size in sizes:
        try:
            answers.append(_search_dimensions(judge, size, asked.flags))
        except InputError as error:
            if len(sizes) == 1:
                raise
            reasons.append(error)
            hint(error.message, asked.flags.quiet)
    if not answers:
        raise reasons[0]
    return _plans(asked, request, judge, answers)


def _require_dry_runs(given: PlanFlags, request: Request, judge: Judge, sizes: Sequence[int]) -> None:
    """Raise `InputError` unless what dry runs need is there, and nobody asks for less or more of
    them; then say what there is to say."""
    from bf16prof.measuring.accelerator import require_model_library, require_optimizer_libraries, require_packages

    if given.no_verify or given.verify is not None:
        flag = "--no-verify" if given.no_verify else "--verify"
        raise InputError(f"{flag}: plans of ranks that share a batch are judged by dry runs alone", hint="leave it out")
    require_packages("planning over ranks that share a batch")
    require_model_library(request.profile.model)
    require_optimizer_libraries([judge.question.job(setting) for size in sizes for setting in judge.question.combinations(size)])
    say_notes(request, given.quiet)


def _plans(asked: Asked[PlanFlags], request: Request, judge: Judge, answers: Sequence[Answer]) -> Plans:
    """What was found by dry runs, whose records know how many parameters there are."""
    records = [record for answer in answers for record in answer.records]
    parameters = next((record.parameters for record in records if record.parameters), None) or _model(request.profile)[1]
    line, theirs = _asked(judge, answers[0], parameters), request.file.content if request.file else None
    return Plans(tuple(answers), _document(answers, request, line), request.profile.name, parameters, request.notes, theirs)


def _require_free_dimensions(given: PlanFlags, profile: Profile) -> None:
    """Raise `InputError` where a search of the dimensions is asked for, and one of them is
    given."""
    from bf16prof.planning.question import by_dry_runs

    if given.search_dimensions and by_dry_runs(profile):
        raise InputError("--search-dimensions: the dimensions are given", hint="leave it out, or --sp, --tp, --pp and --ep")


def _may_search(given: PlanFlags, answers: Sequence[Answer]) -> bool:
    """Whether other ways are looked for where nothing fits ranks that share nothing; says so, or
    why not."""
    if given.no_verify or given.search_dimensions is False:
        return False
    if len(answers) > 1:
        hint("ways that share a batch were not tried, as there are several numbers of GPUs: name one, or --search-dimensions", given.quiet)
        return False
    if answers[0].outlook.unjudged:
        hint("ranks that share a batch were not tried, for some that share nothing could not be judged: --search-dimensions", given.quiet)
        return False
    if not _can_dry_run():
        hint("ranks that share a batch were not tried: dry runs need torch and deepspeed", given.quiet)
        return False
    nothing = f"nothing fits {answers[0].outlook.world_size} GPUs as it is"
    hint(f"{nothing}; in search of other ways: {given.dry_runs} dry runs at most (--no-search-dimensions)", given.quiet)
    return True


def _wider(alone: Answer, given: PlanFlags, request: Request) -> Answer:
    """The answer of a search of the dimensions where it finds one; else that of ranks that share
    nothing, with what was tried besides."""
    from bf16prof.planning.judge import Judge

    try:
        found = _search_dimensions(Judge(_question(given, request, few_recipes=True)), alone.outlook.world_size, given)
    except Bf16profError as error:
        hint(f"not found: {error.message}", given.quiet)
        return alone
    if found.first is not None:
        return found
    tried, left_out = (*alone.outlook.tried, *found.outlook.tried), (*alone.outlook.left_out, *found.outlook.left_out)
    return dataclasses.replace(alone, outlook=dataclasses.replace(alone.outlook, tried=tried, left_out=left_out))


def _search_dimensions(judge: Judge, world_size: int, given: PlanFlags) -> Answer:
    from bf16prof.measuring.machine import package_version
    from bf16prof.planning.by_dimensions import answer_by_dimensions
    from bf16prof.planning.ways import SAVERS

    packages = frozenset(saver.package for saver in SAVERS if saver.package and package_version(saver.package))

    def dry_run(jobs: Sequence[Job]) -> list[MemoryRecord | str]:
        return [r if isinstance(r, str) else with_host_per_node([r], given.gpus_per_node)[0] for r in _each_dry_run(jobs, given)]

    return answer_by_dimensions(judge, world_size, dry_run, given.dry_runs, packages, alone=bool(given.search_dimensions))


def _each_dry_run(jobs: Sequence[Job], given: PlanFlags) -> list[MemoryRecord | str]:
    """The record of each job, or why its dry run has none."""
    from bf16prof.dry_run.runner import DryRunFailed, DryRunRefused
    from bf16prof.measuring.accelerator import can_be_built

    possible = [job for job in jobs if can_be_built(job)]
    reason = "a library that it needs is not installed"
    try:
        found: list[MemoryRecord | str] = [record or reason for record in _dry_run(possible, given)]
    except (DryRunFailed, DryRunRefused) as error:
        found = [error.records.get(index) or error.reasons[index] for index in range(len(possible))]
    in_turn = iter(found)
    return [next(in_turn) if job in possible else reason for job in jobs]


def _without_evaluation(request: Request) -> Request:
    """The request for the steps alone, and a note that says so."""
    profile = request.profile
    if profile.workload.evaluation is None:
        return request
    workload = profile.workload.model_copy(update={"evaluation": None})
    origins = {key: origin for key, origin in request.resolved.origins.items() if not key.startswith("workload.evaluation")}
    resolved = Resolved(profile.model_copy(update={"workload": workload}), origins)
    note = "workload.evaluation: a plan is one of the steps; bf16prof simulate runs the choice with its evaluation"
    return dataclasses.replace(request, resolved=resolved, notes=(*request.notes, note))


def _require_partitions(profile: Profile, stages: Sequence[int], sizes: Sequence[int]) -> None:
    """Raise `Refused` for a number of GPUs that ZeRO++'s secondary partitions do not divide."""
    from bf16prof.engine.constraints import secondary_partitions

    for size in sizes if 3 in stages else ():
        if reason := secondary_partitions(profile.deepspeed.zero_optimization, size):
            raise Refused(f"--gpus {size}: {reason}")


def _to_try(given: PlanFlags, sizes: int) -> int:
    """How many choices are to be run dry. Where nobody asked for it, none without torch and
    DeepSpeed."""
    from bf16prof.measuring.accelerator import require_packages

    if given.no_verify:
        if given.verify is not None:
            raise InputError("--verify and --no-verify exclude each other")
        return 0
    if given.verify is not None:
        if given.verify:
            require_packages("--verify")
        return int(given.verify)
    if not _can_dry_run():
        hint("plans are predicted, not tried: dry runs need torch and deepspeed", given.quiet)
        return 0
    return TRIED if sizes == 1 else 1


def _can_dry_run() -> bool:
    from bf16prof.measuring.machine import package_version

    return package_version("torch") is not None and package_version("deepspeed") is not None


def _tried(answers: Sequence[Answer], judge: Judge, count: int, *, given: PlanFlags) -> list[Answer]:
    """The answers with their first choices run dry; as they are, with the reason, where a dry run
    breaks."""
    from bf16prof.planning.verified import tight_ones, verified

    found = []
    for answer in answers:
        try:
            found.append(verified(answer, tight_ones(judge.seen(answer.outlook.world_size)), lambda jobs: _dry_run(jobs, given), count))
        except Bf16profError as error:
            hint(f"not tried on {answer.outlook.world_size} GPUs: {error.message}", given.quiet)
            found.append(answer)
    return found


def _dry_run(jobs: Sequence[Job], given: PlanFlags) -> list[MemoryRecord | None]:
    """The records of these jobs, `None` of those that cannot be built here."""
    from bf16prof.commands.progress import SimulationProgress
    from bf16prof.dry_run.runner import Options, simulate
    from bf16prof.measuring.accelerator import can_be_built

    possible = [job for job in jobs if can_be_built(job)]
    if not possible:
        return [None] * len(jobs)
    with SimulationProgress(possible, given.quiet) as progress:
        records = iter(simulate(possible, progress, Options(given.expandable_segments)))
    return [next(records) if job in possible else None for job in jobs]


def _require_a_plan(answers: Sequence[Answer], wanted: bool) -> None:
    """Raise `DoesNotFit`, if that is wanted, where nothing fits some number of GPUs."""
    without = [str(answer.outlook.world_size) for answer in answers if answer.first is None]
    if wanted and without:
        raise DoesNotFit(f"--fail-unless-fits: nothing fits on {', '.join(without)} GPUs", hint="the table says what to change first")


def _judge(given: PlanFlags, request: Request) -> Judge:
    from bf16prof.planning.judge import Judge
    from bf16prof.planning.question import by_dry_runs

    question = _question(given, request, few_recipes=by_dry_runs(request.profile) or bool(given.search_dimensions))
    if given.calibrate is None:
        return Judge(question)
    from bf16prof.closed_form.calibration import calibrate
    from bf16prof.runs import load
    from bf16prof.vocabulary import Device

    fitted = calibrate(str(given.calibrate), load(given.calibrate).records)
    if (fitted.device, fitted.gpu) != (Device.GPU, question.gpu.id):
        measured = fitted.gpu or "CPU ranks"
        raise InputError(f"--calibrate {given.calibrate}: measured on {measured}, which tells nothing of {question.gpu.id}")
    return Judge(question, fitted)


def _question(given: PlanFlags, request: Request, *, few_recipes: bool = False) -> Question:
    from bf16prof.planning.question import Question, powers_of_two

    micro, checkpointing, offload = given.micro_batch_size, given.activation_checkpointing, given.offload
    usual = (USUAL_RECIPE,) if few_recipes else tuple(runnable_recipes())
    recipes = (DS_CONFIG,) if request.recipe == DS_CONFIG else tuple(o.words(given.recipe)) or usual
    return Question(
        _with_accumulation(request),
        find_gpu(given.gpu),
        stages=tuple(dict.fromkeys(o.numbers("--zero", given.zero))),
        recipes=tuple(dict.fromkeys(recipes)),
        micro_batches=powers_of_two(given.micro_batch_limit) if micro is None else (micro,),
        checkpointing=(False, True) if checkpointing is None else (checkpointing,),
        offloads=tuple(Offload) if offload is None else (offload,),
        margin=None if given.margin is None else o.percentage(given.margin, "--margin", below=1),
        may_change_init=given.zero_init is None,
        assumed=request.resolved.assumed,
        expandable=given.expandable_segments,
        gpus_per_node=given.gpus_per_node,
        train_batch_size=request.batch.train if request.batch else None,
    )


def _with_accumulation(request: Request) -> Profile:
    """The profile with the micro-steps of a DeepSpeed JSON; where that says the batch of the job,
    they follow from it instead."""
    steps = request.batch.accumulation if request.batch else None
    if steps is None:
        return request.profile
    workload = request.profile.workload.model_copy(update={"gradient_accumulation_steps": steps})
    return request.profile.model_copy(update={"workload": workload})


def _asked(judge: Judge, answer: Answer, parameters: int) -> str:
    """The line that says what is planned, and what the plan is free to choose."""
    from bf16prof.engine.workload import workload_of
    from bf16prof.reports.asked import planned_line

    question = judge.question
    free = {
        "ZeRO stage": len(question.stages) > 1,
        "recipe": len(question.recipes) > 1,
        "micro-batch": len(question.micro_batches) > 1,
        "accumulation": question.train_batch_size is not None,
        "checkpointing": len(question.checkpointing) > 1,
        "offload": len(question.offloads) > 1,
        "zero.Init": not question.profile.workload.zero_init,
        "ranks that share a batch": any(plan.chosen for plan in answer.outlook.plans),
    }
    settings = list(question.combinations(answer.outlook.world_size))
    jobs = [job for setting in settings if (job := judge.job(setting)) is not None] or [question.job(s) for s in settings[:1]]
    if not jobs:
        return ""
    return planned_line(workload_of(jobs[0]), question.profile.name, parameters, [word for word, is_free in free.items() if is_free])


def _write(found: Plans, given: PlanFlags) -> None:
    for path in given.output or ():
        write_text(path, found.text(path.suffix), replace=given.force)
    if given.write is not None and found.answers[0].first is not None:
        write_text(given.write, found.deepspeed_json(), replace=given.force)


def _model(profile: Profile) -> tuple[str, int]:
    """The profile's name, and how many parameters its model has."""
    from bf16prof.closed_form.anatomy import parameter_count

    return profile.name, parameter_count(profile)


def _document(answers: Sequence[Answer], request: Request, asked: str) -> dict[str, Any]:
    """The plans that fit, the record of the best of each case, and what else there is to say of
    each number of GPUs."""
    outlooks = []
    for answer in answers:
        outlook = as_json(dataclasses.replace(answer.outlook, plans=()))
        del outlook["plans"]
        outlooks.append({**outlook, "room": {**outlook["room"], "bytes": answer.outlook.room.bytes}})
    plans = [plan for answer in answers for plan in answer.outlook.plans]
    said = settings(recorded(request.profile), request.resolved.origins)
    records = [record for answer in answers for record in answer.records]
    return document(records, asked=asked, settings=said, plans=plans, outlooks=outlooks)


def show(found: Plans, console: Console, *, verbose: bool) -> None:
    """Print what was asked and what was found."""
    from rich.text import Text

    from bf16prof.reports.console import plan_sizes, plan_view

    console.print(Text(found.document["asked"], "cyan"))
    named: dict[str, Any] = {"profile": found.profile, "parameters": found.parameters}
    if len(found.answers) > 1:
        plan_sizes([answer.outlook for answer in found.answers], console, **named)
    for answer in found.answers if verbose or len(found.answers) == 1 else ():
        record = answer.first.record if answer.first else None
        plan_view(answer.outlook.up_to(None if verbose else SHOWN), console, **named, record=record, verbose=verbose)


def _hints(asked: Asked[PlanFlags], answers: Sequence[Answer], request: Request, write: Path | None, quiet: bool) -> None:
    from bf16prof.planning.written import flags, launch_line, outside_the_config

    found = next((answer for answer in answers if answer.first is not None), None)
    if found is None or found.first is None:
        return
    if write is not None:
        hint(
            f"{write} is ready; it cannot say: "
            + "; ".join(outside_the_config(found.first, request.file.content if request.file else None)),
            quiet,
        )
        hint(f"launch: {launch_line(found.first, asked.flags.gpus_per_node, str(write))}", quiet)
    hint(next_command("simulate", asked, *flags(found.first, found.outlook.room, request.profile)), quiet)
