"""How far things go: the fewest GPUs, the largest micro-batch, the longest sequence."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.question import Setting, powers_of_two
from bf16prof.plans import Limits, Plan
from bf16prof.profiles.recipes import find_recipe
from bf16prof.records import Offload

MOST_GPUS = 1024
_POWERS = powers_of_two(MOST_GPUS)
LARGEST_MICRO_BATCH = 2**14
LONGEST_SEQUENCE = 2**20
"""Where the model sets no limit."""
SEQUENCE_STEP = 64
"""Longest sequences are told in multiples of this many tokens."""


def limits(judge: Judge, world_size: int, first: Judged | None) -> Limits:
    """The limits for a number of GPUs and the first choice on them."""
    found = Limits(tuple(fewest_gpus(judge, world_size)))
    if first is None:
        return found
    free = Judge(dataclasses.replace(judge.question, profile=first.job.profile, train_batch_size=None))
    start = first.setting
    micro = largest_micro_batch(free, start)
    sequence, longest = _longest_sequence(free, start)
    *_, same = itertools.takewhile(lambda n: free.fits(start.but(world_size=n)), _down(start.world_size))
    return dataclasses.replace(found, same_gpus=same, micro_batch_size=micro, sequence_length=sequence, longest=longest)


def largest_micro_batch(judge: Judge, start: Setting) -> int:
    """The largest that fits, all else as in a setting that fits."""
    return _largest(start.micro_batch_size, LARGEST_MICRO_BATCH, lambda n: judge.fits(start.but(micro_batch_size=n)))


def fewest_gpus(judge: Judge, world_size: int) -> list[Plan]:
    """A plan on the fewest GPUs for each kind of offloading; with more of it only where it needs fewer."""
    found: list[Plan] = []
    for offload in Offload:
        start = found[-1].case.world_size if found else world_size
        fitting = [judged.plan for judged in itertools.takewhile(bool, (_anything(judge, n, offload) for n in _down(start))) if judged]
        if not fitting and not found:
            more = (_anything(judge, n, offload) for n in _POWERS if n > start)
            fitting = [judged.plan for judged in itertools.islice(filter(None, more), 1)]
        if fitting and (not found or fitting[-1].case.world_size < start):
            found.append(fitting[-1])
    return found


def _anything(judge: Judge, size: int, offload: Offload) -> Judged | None:
    """Any plan that fits, those that need least tried first."""
    frugal = sorted((s for s in judge.question.combinations(size) if s.offload is offload), key=_appetite)
    return next((judge(setting) for setting in frugal if judge.fits(setting)), None)


def _appetite(setting: Setting) -> tuple[int, bool, int]:
    return -setting.stage, not setting.checkpointing, find_recipe(setting.recipe).steady_bytes_per_parameter


def _down(size: int) -> list[int]:
    """So many GPUs, then fewer by powers of two."""
    return [size, *(n for n in reversed(_POWERS) if n < size)]


def _longest_sequence(judge: Judge, start: Setting) -> tuple[int, bool]:
    """The longest that fits, and whether the model allows no longer one."""
    limit = judge.question.profile.model.longest_sequence
    longest = limit[1] if limit else LONGEST_SEQUENCE
    if judge.fits(start.but(sequence_length=longest)):
        return longest, limit is not None
    steps = start.sequence_length // SEQUENCE_STEP, longest // SEQUENCE_STEP
    found = _largest(*steps, lambda n: judge.fits(start.but(sequence_length=n * SEQUENCE_STEP)))
    return max(start.sequence_length, found * SEQUENCE_STEP), False


def _largest(fitting: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, given one that does; what is larger never fits where less does not."""
    low, step = fitting, max(1, fitting)
    while low + step <= most and fits(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
