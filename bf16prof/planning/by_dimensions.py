"""Plans that search the dimensions: how ranks share a batch, and what keeps activations small,
where ranks that share nothing do not do.

All ways that DeepSpeed's rules admit are ordered by a lower bound of their peak (`bound.py`), and
few are run dry:

1. For each kind of offloading, the one whose bound is lowest. Where none of them fits, the lowest
   of every other dimension.
2. Of the least offloading that fits, what is to be preferred: no recomputation, fewer ranks that
   share, fewer changes of the model, a lower stage. What a dry run held of activations says which
   of these have a chance, as they grow with a rank's part of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.constraints import refusal_reason
from bf16prof.errors import InputError
from bf16prof.planning.answer import Answer
from bf16prof.planning.bound import Least, least_of, states_of
from bf16prof.planning.by_dry_run import inside, judged_dry
from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.question import Question, Setting
from bf16prof.planning.ways import Way, ways
from bf16prof.plans import Limits, Outlook
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Component, Offload

TOGETHER = 2
"""So many choices are run together once one is known to fit."""

OFFLOADS = list(Offload)

EachDryRun = Callable[[Sequence[Job]], Sequence[MemoryRecord | str]]
"""Runs jobs dry; their records, in their order, or why one has none."""


@dataclass(frozen=True)
class Choice:
    """A way with a setting, the job that they are, and what its peak is not below."""

    way: Way
    question: Question
    setting: Setting
    job: Job
    least: Least

    @property
    def preference(self) -> tuple[int, bool, int, int, int]:
        """The smallest first: how fast they are is not known, and these are what costs time or
        work."""
        setting, way = self.setting, self.way
        return OFFLOADS.index(setting.offload), setting.checkpointing, way.size, len(way.savers), setting.stage

    @property
    def need(self) -> tuple[int, int, int]:
        """What needs least first: by the bound, then by what the bound does not see."""
        return self.least.bytes, -len(self.way.savers), -self.way.size

    def estimate_bytes(self, other: Choice, record: MemoryRecord) -> int:
        """What it should need by the dry run of another that differs in its size and savers alone,
        and has no saver less; 0 by any other.

        Activations grow as a rank's part of the sequence does. Those of ranks that share layers are
        divided by no exact rule.
        """
        mine, theirs = self.way, other.way
        shares_tokens = {mine.dimension, theirs.dimension} <= {"", "sequence"}
        if self.but_for_the_way != other.but_for_the_way or len(mine.savers) > len(theirs.savers):
            return 0
        if not shares_tokens and (mine.dimension != theirs.dimension or mine.size > theirs.size):
            return 0
        more = Fraction(theirs.size, mine.size) - 1 if shares_tokens else 0
        activations = record.peak_components.get(Component.ACTIVATIONS, 0)
        return int((record.peak_allocated_bytes or 0) + self.least.held_bytes - other.least.held_bytes + activations * more)

    @property
    def but_for_the_way(self) -> tuple[int, str, Offload, bool]:
        """What decides what the engine itself holds during a step: the stage's buffers, what is
        gathered, what is on the host."""
        setting = self.setting
        return setting.stage, setting.recipe, setting.offload, setting.checkpointing


@dataclass(frozen=True)
class Field:
    """What there is to choose from, and why all else is not: by a rule of DeepSpeed's, or for its
    bound."""

    choices: tuple[Choice, ...]
    refused: tuple[str, ...]
    hopeless: int

    @property
    def left_out(self) -> list[str]:
        """In a line each, for a person."""
        many = f"{self.hopeless} settings that need more than there is by what they keep between steps and for backward alone"
        return [*self.refused, *([many] if self.hopeless else [])]


def answer_by_dimensions(
    judge: Judge, world_size: int, dry_run: EachDryRun, most: int, packages: frozenset[str], *, alone: bool = False
) -> Answer:
    """The choices that fit, the first one first, after so many dry runs at most; with ranks that
    share nothing among them if `alone`.

    Raises `InputError` where there is nothing to try.
    """
    room = judge.question.room(world_size)
    field = field_of(judge.question, world_size, room.allocator_bytes, packages, alone=alone)
    if not field.choices:
        reasons = "; ".join(field.left_out) or f"{world_size} ranks have nothing to share"
        raise InputError(f"--search-dimensions: nothing to try on {world_size} GPUs: {reasons:.600}")
    search = _DimensionSearch(dry_run, most, room.allocator_bytes)
    search.run(field.choices)
    found, failed = [one for _, one in search.fitting], [one for _, one in search.failed]
    if not search.found:
        raise InputError(f"--search-dimensions: no dry run on {world_size} GPUs came to its end: {'; '.join(search.reasons):.600}")
    nearest = None if found else max(failed, key=lambda one: one.plan.free_bytes, default=None)
    missed = len(field.choices) - search.count
    tried = f"{missed} of {len(field.choices)} settings that may fit were not run dry (--dry-runs {most})"
    outlook = Outlook(
        world_size=world_size,
        room=room,
        plans=tuple(one.plan for one in found),
        complete=True,
        combinations=len(field.choices),
        left_out=(*([tried] if missed else []), *search.reasons, *field.left_out),
        limits=Limits((), are_known=False),
        nearest=nearest.plan if nearest else None,
        tried=tuple(one.plan for one in failed if one is not nearest),
    )
    return Answer(outlook, tuple(found), judge)


def field_of(question: Question, world_size: int, limit_bytes: int, packages: frozenset[str], *, alone: bool = False) -> Field:
    """Every way (`ways`) and setting, parted into those to choose from and the others."""
    states = _States(question)
    refused: dict[tuple[str, str], list[Way]] = {}
    choices, hopeless = [], 0
    for way in ways(question.profile, world_size, packages, alone=alone):
        like = replace(question, profile=way.laid_over(question.profile))
        jobs = [(setting, like.job(setting)) for setting in inside(like, world_size)]
        reasons = [refusal_reason(job) for _, job in jobs]
        if all(reasons):
            reason = reasons[0] if reasons else f"no micro-batch makes up the train_batch_size of {question.train_batch_size}"
            refused.setdefault((way.dimension, str(reason)), []).append(way)
        for (setting, job), reason in zip(jobs, reasons, strict=True):
            if reason is None:
                choice = Choice(way, like, setting, job, least_of(job, states.of(setting)))
                is_hopeless = choice.least.bytes > limit_bytes
                hopeless += is_hopeless
                choices += [] if is_hopeless else [choice]
    return Field(tuple(choices), tuple(_refusal(reason, of) for (_, reason), of in refused.items()), hopeless)


class _States:
    """What the ranks of a question hold of the model at each setting, had they shared nothing."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._known: dict[Setting, Mapping[Component, int]] = {}

    def of(self, setting: Setting) -> Mapping[Component, int]:
        """By component; each is worked out once."""
        key = setting.but(checkpointing=True)
        if key not in self._known:
            self._known[key] = states_of(self._question.job(key))
        return self._known[key]


def _refusal(reason: str, refused: Sequence[Way]) -> str:
    """One line for a reason: the flags of the first way that it refuses, with the sizes of all that
    it refuses there."""
    first = refused[0]
    sizes = ",".join(dict.fromkeys(str(way.size) for way in refused))
    dimension = [first.dimension_flags[0], sizes] if first.dimension else []
    return f"{' '.join([*dimension, *first.saver_flags])}: {reason}"


class _DimensionSearch:
    """Runs choices dry, so many at most, and remembers what came of them."""

    def __init__(self, dry_run: EachDryRun, most: int, limit_bytes: int) -> None:
        self._dry_run, self._most, self._limit_bytes = dry_run, most, limit_bytes
        self.found: list[tuple[Choice, Judged]] = []
        self.broken: list[tuple[Way, str]] = []
        self._asked: set[tuple[Way, Setting]] = set()

    @property
    def count(self) -> int:
        """How many were run to their end."""
        return len(self.found)

    @property
    def reasons(self) -> list[str]:
        """Why dry runs broke."""
        return [f"{' '.join(way.flags) or 'as it is'}: {reason}" for way, reason in self.broken]

    @property
    def fitting(self) -> list[tuple[Choice, Judged]]:
        """What fits, the first choice first."""
        return sorted(((choice, one) for choice, one in self.found if one.fits), key=lambda pair: pair[0].preference)

    @property
    def failed(self) -> list[tuple[Choice, Judged]]:
        """What does not."""
        return [(choice, one) for choice, one in self.found if not one.fits]

    def run(self, choices: Sequence[Choice]) -> None:
        """Look for what fits, then for what is better."""
        for start in range(0, len(OFFLOADS), TOGETHER):
            levels = OFFLOADS[start : start + TOGETHER]
            if not self.fitting:
                self._lowest_of_each(
                    [c for c in choices if c.setting.offload in levels], lambda choice: OFFLOADS.index(choice.setting.offload)
                )
        if not self.fitting:
            self._lowest_of_each(choices, lambda choice: choice.way.dimension)
        while batch := self._better(choices)[:TOGETHER]:
            self._try(batch)

    def _lowest_of_each(self, choices: Sequence[Choice], kind: Callable[[Choice], Any]) -> None:
        """Run of each kind the choice that needs least; where that breaks, the next."""
        missing = {kind(choice) for choice in choices}
        while missing and self.count < self._most:
            lowest: dict[Any, Choice] = {}
            for choice in sorted(filter(self._may_fit, choices), key=lambda choice: choice.need):
                if kind(choice) in missing:
                    lowest.setdefault(kind(choice), choice)
            if not lowest:
                return
            self._try([lowest[key] for key in sorted(lowest)])
            missing &= lowest.keys() - {kind(choice) for choice, _ in self.found}

    def _try(self, choices: Sequence[Choice]) -> None:
        """Run these dry, as far as dry runs are left. One that breaks has taken no time and is not
        counted."""
        wanted = choices[: self._most - self.count]
        self._asked |= {(choice.way, choice.setting) for choice in wanted}
        for choice, record in zip(wanted, self._dry_run([choice.job for choice in wanted]), strict=True):
            if isinstance(record, str):
                self.broken.append((choice.way, record))
            else:
                self.found.append((choice, judged_dry(choice.question, choice.setting, choice.job, record, chosen=choice.way.flags)))

    def _better(self, choices: Sequence[Choice]) -> list[Choice]:
        """What offloads as much as the best that fits, is to be preferred to it, and may fit too;
        none where no dry run is left.

        With all savers first: where that does not fit, nothing like it with fewer does.
        """
        if not self.fitting or self.count >= self._most:
            return []
        best = self.fitting[0][0]
        hopeful = (
            choice
            for choice in choices
            if choice.setting.offload is best.setting.offload and choice.preference < best.preference and self._may_fit(choice)
        )
        return sorted(hopeful, key=lambda choice: (*choice.preference[:3], -len(choice.way.savers), choice.setting.stage))

    def _may_fit(self, choice: Choice) -> bool:
        """Whether it has not been tried, and no dry run of one that is like it says that it should
        not fit, or breaks."""
        if (choice.way, choice.setting) in self._asked or any(choice.way.is_more_than(way) for way, _ in self.broken):
            return False
        return all(choice.estimate_bytes(other, one.record) <= self._limit_bytes for other, one in self.found)
