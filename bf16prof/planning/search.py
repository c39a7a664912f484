"""The search for plans on a number of GPUs, the first choice first.

In this order:

* offloading: plans with less of it first; those with more are looked for only where more plans are
  wanted. The CPU's share of the time is in no bound, so throughputs compare only among equals;
* throughput at most, or calibrated: what a bound cannot tell apart counts as equal (`plans.EQUAL`);
* risk in learning (`LEARNING`), then the lowest ZeRO stage, then the order of the recipes.

Of the micro-batches of a combination the fastest is taken, and of those as fast the smallest, which
leaves most memory free.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.question import Setting
from bf16prof.plans import EQUAL
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.vocabulary import Offload

AS_FAST = 0.01
"""Micro-batches of one combination this close are as fast."""

LEARNING = ("fp32 master", "compensated", "stochastic rounding", "bf16 only")
"""Classes of recipes, the least risk first: whether small updates reach the weights
(`Recipe.learning`)."""


def best_first(judge: Judge, world_size: int) -> Iterator[Judged]:
    """Every combination of stage, recipe, offloading and checkpointing that fits, each with its
    best micro-batch.

    Combinations are ranked by what their peaks allow, and judged in full when their turn comes;
    those that the allocator leaves less than that go back to where their smaller micro-batch
    belongs.
    """
    combinations = list(judge.question.combinations(world_size))
    guesses: dict[bool, int] = {}
    for offload in Offload:
        found = [one for setting in combinations if setting.offload is offload and (one := Candidate.of(judge, setting, guesses))]
        for is_calibrated in (True, False):
            yield from _confirmed(judge, [one for one in found if (one.best.plan.tokens_per_s is not None) is is_calibrated])


@dataclass(frozen=True)
class Candidate:
    """A combination with all its micro-batches, how many of these may fit, and the best of them,
    judged by its peak.

    The best is the smallest micro-batch that is as fast as any that may fit: a larger one never
    needs less memory, and never trains fewer tokens in the floor of its time.
    """

    settings: Sequence[Setting]
    count: int
    best: Judged

    @classmethod
    def of(cls, judge: Judge, combination: Setting, guesses: dict[bool, int]) -> Candidate | None:
        """The candidate of a combination; `None` if no micro-batch may fit. `guesses`: how many did
        last, by checkpointing."""
        settings = [combination.but(micro_batch_size=size) for size in judge.question.sizes(combination.world_size)]
        count = guesses[combination.checkpointing] = _fitting(judge, settings, guesses.get(combination.checkpointing, 1))
        return cls._with(judge, settings, count)

    @classmethod
    def _with(cls, judge: Judge, settings: Sequence[Setting], count: int) -> Candidate | None:
        if not count:
            return None
        fitting = settings[:count]
        enough = _throughput(judge, fitting[-1]) / (1 + AS_FAST)
        chosen = bisect.bisect_left(fitting, True, key=lambda setting: _throughput(judge, setting) >= enough)
        best = judge.roughly(fitting[chosen])
        assert best is not None, "what may fit was judged"
        return cls(settings, count, best)

    def confirmed(self, judge: Judge) -> Candidate | None:
        """The same with those micro-batches alone that fit in full; `None` if none does."""
        count = self.count
        while count and not judge.fits(self.settings[count - 1]):
            count -= 1
        return self if count == self.count else Candidate._with(judge, self.settings, count)

    def in_full(self, judge: Judge) -> Judged:
        """The best of them, judged in full."""
        chosen, largest = self.best.setting.but(zero_init=self.settings[0].zero_init), self.settings[self.count - 1]
        best = judge(chosen) if judge.fits(chosen) else judge(largest)  # which fits, even where a smaller one finds no room
        assert best is not None, "it was judged roughly"
        return replace(best, plan=replace(best.plan, largest_micro_batch_size=largest.micro_batch_size))


def _confirmed(judge: Judge, candidates: Sequence[Candidate]) -> Iterator[Judged]:
    waiting, fastest = _fastest_confirmed(judge, list(candidates))
    while waiting:
        order = {id(one): place for place, one in enumerate(ranked(judge, [candidate.best for candidate in waiting], fastest))}
        first = min(waiting, key=lambda candidate: order[id(candidate.best)])
        waiting.remove(first)
        found = first.confirmed(judge)
        if found is first:
            yield first.in_full(judge)
        elif found is not None:
            waiting.append(found)


def _fastest_confirmed(judge: Judge, waiting: list[Candidate]) -> tuple[list[Candidate], float]:
    """The candidates, and the throughput of the fastest that fits in full: all are ranked against
    it."""
    while waiting:
        first = max(waiting, key=lambda candidate: candidate.best.plan.throughput)
        found = first.confirmed(judge)
        if found is first:
            return waiting, first.best.plan.throughput
        waiting.remove(first)
        waiting += [found] if found is not None else []
    return waiting, 0.0


def ranked(judge: Judge, found: Sequence[Judged], fastest: float | None = None) -> list[Judged]:
    """Plans whose throughputs compare, the first choice first; `fastest`: what they are compared
    with, their own best if not given."""
    fastest = max((one.plan.throughput for one in found), default=0.0) if fastest is None else fastest
    is_calibrated = judge.calibration is not None and any(one.plan.tokens_per_s is not None for one in found)
    width = max(judge.calibration.error_share, AS_FAST) if judge.calibration and is_calibrated else EQUAL
    recipes = list(runnable_recipes())

    def key(one: Judged) -> tuple[int, int, int, int, bool]:
        plan, case = one.plan, one.plan.case
        behind = math.floor(math.log(fastest / plan.throughput) / math.log1p(width))
        return behind, LEARNING.index(plan.learning), case.zero_stage, recipes.index(case.recipe), plan.activation_checkpointing

    return sorted(found, key=key)


def _fitting(judge: Judge, settings: Sequence[Setting], guess: int) -> int:
    """How many of these may fit, the smallest first; two are looked at where the guess is right."""
    count = min(guess, len(settings))
    while count and not judge.may_fit(settings[count - 1]):
        count -= 1
    while count < len(settings) and judge.may_fit(settings[count]):
        count += 1
    return count


def _throughput(judge: Judge, setting: Setting) -> float:
    judged = judge.roughly(setting)
    assert judged is not None, "what may fit was judged"
    return judged.plan.throughput
