"""How far things go: the fewest GPUs, the largest micro-batch, the longest sequence."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable

from bf16prof.closed_form.anatomy import is_written
from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.question import Setting
from bf16prof.plans import Limits, Plan
from bf16prof.profiles.gpus import GPUS_PER_NODE
from bf16prof.profiles.recipes import find_recipe
from bf16prof.signatures import store
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.vocabulary import Offload

MOST_GPUS = 1024
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
    free, start = free_judge(judge, first), first.setting
    same = _fewest(start.world_size, lambda n: free.fits(start.but(world_size=n)))
    if not is_written(first.job.profile):
        micro_batch, length = _as_far_as_known(free, first)
        return dataclasses.replace(found, same_gpus=same, micro_batch_size=micro_batch, sequence_length=length)
    micro = largest_micro_batch(free, start)
    sequence, longest = _longest_sequence(free, start)
    return dataclasses.replace(found, same_gpus=same, micro_batch_size=micro, sequence_length=sequence, longest=longest)


def _as_far_as_known(free: Judge, first: Judged) -> tuple[int | None, int | None]:
    """The largest micro-batch and the longest sequence of a recorded model, where less does not fit
    than what is known of it at all: beyond, every step of the search would be a pass of the model's
    own code to record."""
    general, start = store.general_of(Inquiry.of(first.job)), first.setting
    if general is None:
        return None, None
    batches, lengths = (general.reach((start.micro_batch_size, start.sequence_length), axis) for axis in (0, 1))
    micro, length = start.micro_batch_size, start.sequence_length // SEQUENCE_STEP
    if batches > micro:
        micro = _largest(micro, batches, lambda n: free.fits(start.but(micro_batch_size=n)))
    if lengths // SEQUENCE_STEP > length:
        length = _largest(length, lengths // SEQUENCE_STEP, lambda n: free.fits(start.but(sequence_length=n * SEQUENCE_STEP)))
    longest = max(start.sequence_length, length * SEQUENCE_STEP)
    return micro if micro < batches else None, longest if length < lengths // SEQUENCE_STEP else None


def free_judge(judge: Judge, first: Judged) -> Judge:
    """One that judges a choice at any batch size."""
    return Judge(dataclasses.replace(judge.question, profile=first.job.profile, train_batch_size=None))


def largest_micro_batch(judge: Judge, start: Setting) -> int:
    """The largest that fits, all else as in a setting that fits."""
    return _largest(start.micro_batch_size, LARGEST_MICRO_BATCH, lambda n: judge.fits(start.but(micro_batch_size=n)))


def fewest_gpus(judge: Judge, world_size: int) -> list[Plan]:
    """A plan on the fewest GPUs for each kind of offloading; with more of it only where it needs
    fewer."""
    found: list[Plan] = []
    for offload in Offload:
        start = found[-1].case.world_size if found else world_size
        anything = functools.cache(functools.partial(_anything, judge, offload=offload))
        size = _fewest(start, anything, most=start if found else MOST_GPUS)
        if size is not None and (best := anything(size)) and (not found or size < start):
            found.append(best.plan)
    return found


def _fewest(start: int, fits: Callable[[int], object], most: int = MOST_GPUS) -> int | None:
    """The fewest GPUs that fit, by doubling or halving and then between the last two, whole nodes
    where a node is not enough.

    `None` if not even `most` do. What fits on some number is taken to fit on more.
    """
    if fits(start):
        enough, less = start, start // 2
        while less and fits(less):
            enough, less = less, less // 2
    else:
        less, enough = start, 2 * start
        while enough <= most and not fits(enough):
            less, enough = enough, 2 * enough
        if enough > most:
            return None
    between = [n for n in range(less + 1, enough) if n <= GPUS_PER_NODE or n % GPUS_PER_NODE == 0]
    return next(iter(between[bisect.bisect_left(between, True, key=lambda n: bool(fits(n))) :]), enough)


def _anything(judge: Judge, size: int, *, offload: Offload) -> Judged | None:
    """Any plan that fits, those that need least tried first."""
    frugal = sorted((s for s in judge.question.combinations(size) if s.offload is offload), key=_appetite)
    return next((judge(setting) for setting in frugal if judge.fits(setting)), None)


def _appetite(setting: Setting) -> tuple[int, bool, int]:
    return -setting.stage, not setting.checkpointing, find_recipe(setting.recipe).steady_bytes_per_parameter


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
    """The largest number up to `most` that fits, given one that does; what is larger never fits
    where less does not."""
    low, step = fitting, max(1, fitting)
    while low + step <= most and fits(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
