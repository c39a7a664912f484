"""The search for plans on a number of GPUs, the first choice first.

In this order:

* offloading: plans with less of it first; those with more are looked for only where more plans are wanted. The CPU's share of the time is
  in no bound, so throughputs compare only among equals;
* throughput at most, or calibrated: what a bound cannot tell apart counts as equal (`plans.EQUAL`);
* risk in learning (`LEARNING`), then the lowest ZeRO stage, then the order of the recipes.

Of the micro-batches of a combination the fastest is taken, and of those as fast the smallest, which leaves most memory free.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.question import Setting
from bf16prof.plans import EQUAL
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.records import Offload

AS_FAST = 0.01
"""Micro-batches of one combination this close are as fast."""

LEARNING = ("fp32 master", "compensated", "stochastic rounding", "bf16 only")
"""Classes of recipes, the least risk first: whether small updates reach the weights (`Recipe.learning`)."""


def best_first(judge: Judge, world_size: int) -> Iterator[Judged]:
    """Every combination of stage, recipe, offloading and checkpointing that fits, each with its best micro-batch."""
    combinations = list(judge.question.combinations(world_size))
    guesses: dict[bool, int] = {}
    for offload in Offload:
        found = [best for setting in combinations if setting.offload is offload and (best := best_micro_batch(judge, setting, guesses))]
        for is_calibrated in (True, False):
            yield from ranked(judge, [one for one in found if (one.plan.tokens_per_s is not None) is is_calibrated])


def best_micro_batch(judge: Judge, combination: Setting, guesses: dict[bool, int]) -> Judged | None:
    """The smallest micro-batch that is as fast as any that fits; `None` if none does.

    A larger one never needs less memory, and never trains fewer tokens in the floor of its time. `guesses`: how many fitted last, with
    checkpointing and without.
    """
    settings = [combination.but(micro_batch_size=size) for size in judge.question.sizes(combination.world_size)]
    count = guesses[combination.checkpointing] = _fitting(judge, settings, guesses.get(combination.checkpointing, 1))
    if not count:
        return None
    fitting = settings[:count]
    enough = _throughput(judge, fitting[-1]) / (1 + AS_FAST)
    chosen = bisect.bisect_left(fitting, True, key=lambda setting: _throughput(judge, setting) >= enough)
    best = judge(fitting[chosen])
    assert best is not None, "what fits was judged"
    return replace(best, plan=replace(best.plan, largest_micro_batch_size=fitting[-1].micro_batch_size))


def ranked(judge: Judge, found: Sequence[Judged]) -> list[Judged]:
    """Plans whose throughputs compare, the first choice first."""
    fastest = max((one.plan.throughput for one in found), default=0.0)
    is_calibrated = judge.calibration is not None and any(one.plan.tokens_per_s is not None for one in found)
    width = max(judge.calibration.error_share, AS_FAST) if judge.calibration and is_calibrated else EQUAL
    recipes = list(runnable_recipes())

    def key(one: Judged) -> tuple[int, int, int, int, bool]:
        plan, case = one.plan, one.plan.case
        behind = math.floor(math.log(fastest / plan.throughput) / math.log1p(width))
        return behind, LEARNING.index(plan.learning), case.zero_stage, recipes.index(case.recipe), plan.activation_checkpointing

    return sorted(found, key=key)


def _fitting(judge: Judge, settings: Sequence[Setting], guess: int) -> int:
    """How many of these fit, the smallest first; two are looked at where the guess is right."""
    count = min(guess, len(settings))
    while count and not judge.fits(settings[count - 1]):
        count -= 1
    while count < len(settings) and judge.fits(settings[count]):
        count += 1
    return count


def _throughput(judge: Judge, setting: Setting) -> float:
    judged = judge(setting)
    assert judged is not None, "what fits was judged"
    return judged.plan.throughput
