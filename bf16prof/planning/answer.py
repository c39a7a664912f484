"""The answer to a question for a number of GPUs: what fits, the first choice first; how far it
goes; what to change where nothing does."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from bf16prof.engine.constraints import refusal_reason
from bf16prof.errors import InputError, Refused
from bf16prof.planning.advice import all_changes, beyond, compare_stages
from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.limits import limits
from bf16prof.planning.question import Setting
from bf16prof.planning.search import best_first
from bf16prof.plans import Outlook
from bf16prof.records import Case, MemoryRecord


@dataclass(frozen=True)
class Answer:
    """The outlook, what is behind its plans, in their order, and who judged them."""

    outlook: Outlook
    choices: tuple[Judged, ...]
    judge: Judge

    @property
    def first(self) -> Judged | None:
        """The first choice."""
        return self.choices[0] if self.choices else None

    @property
    def records(self) -> list[MemoryRecord]:
        """The records of the best plan of each case."""
        best: dict[Case, MemoryRecord] = {}
        for choice in self.choices:
            best.setdefault(choice.record.case, choice.record)
        return list(best.values())


def answer(judge: Judge, world_size: int, most: int | None = None) -> Answer:
    """Everything about one number of GPUs, with the `most` best plans (all if not given).

    Raises `Refused` where DeepSpeed runs no combination or none has peaks in closed form,
    `InputError` where no batch size is possible.
    """
    settings = list(judge.question.combinations(world_size))
    found = list(itertools.islice(best_first(judge, world_size), None if most is None else most + 1))
    choices = tuple(found[:most])
    first = choices[0] if choices else None
    judged = {setting for setting in settings if math.isfinite(judge.least_bytes(setting))}
    others = [setting for setting in settings if setting not in judged]
    nearest = None if first else _nearest(judge, [setting for setting in settings if setting in judged])
    like = first or nearest
    if like is None:
        raise nothing_to_judge(judge, world_size)
    return Answer(
        Outlook(
            world_size=world_size,
            room=judge.question.room(world_size),
            plans=tuple(choice.plan for choice in choices),
            complete=len(found) == len(choices),
            combinations=len(judged),
            unjudged=sum(refusal_reason(judge.question.job(setting)) is None for setting in others),
            left_out=tuple(judge.left_out),
            limits=limits(judge, world_size, first),
            nearest=nearest.plan if nearest else None,
            changes=tuple(all_changes(judge, nearest)) if nearest else (),
            beyond=tuple(beyond(nearest)) if nearest else (),
            stages=compare_stages(judge, like),
        ),
        choices,
        judge,
    )


def _nearest(judge: Judge, settings: list[Setting]) -> Judged | None:
    """The setting that lacks least. Once one is known, those that need more than its peak at least
    are not looked at."""
    least = {setting: judge.least_bytes(setting) for setting in settings}
    best: Judged | None = None
    for setting in sorted(least, key=lambda setting: least[setting]):
        if best is not None and least[setting] >= best.plan.peak_bytes:
            break
        judged = judge.roughly(setting)
        if judged is not None and (best is None or judged.plan.peak_bytes < best.plan.peak_bytes):
            best = judged
    return best and judge(best.setting)


def nothing_to_judge(judge: Judge, world_size: int) -> InputError:
    """Why no setting of a number of GPUs could be judged."""
    question = judge.question
    settings = list(question.combinations(world_size))
    if not settings:
        sizes = ", ".join(map(str, question.micro_batches))
        return InputError(f"--gpus {world_size}: no micro-batch of {sizes} makes up the train_batch_size of {question.train_batch_size}")
    if judge.left_out:
        return Refused(next(iter(judge.left_out)), hint="bf16prof simulate with the same flags runs the real engine dry")
    job = question.job(settings[0])
    return Refused(f"{job.case.label}: {refusal_reason(job)}", hint="leave --zero, --recipe or --offload out, or name others")
