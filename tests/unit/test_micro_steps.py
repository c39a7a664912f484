"""Micro-steps that are left out: what the ledger does in their place, and when nothing may be left
out."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from bf16prof.allocator import CachingAllocator
from bf16prof.dry_run.ledger import Allocation, Instant, Ledger
from bf16prof.dry_run.micro_steps import COMPARED, MicroSteps
from bf16prof.dry_run.repeat import Body, last_step, repeat, repeat_body
from bf16prof.vocabulary import Component, Phase

MIB = 2**20
LABEL = (Component.ACTIVATIONS, "x")
SIZES = (3 * MIB, 700, 9 * MIB, 40_000)


def micro_step(ledger: Ledger, carried: Sequence[Allocation], sizes: Sequence[int] = SIZES) -> list[Allocation]:
    """One micro-step: two storages take the place of two that the last one left, the others end
    with it."""
    ledger.mark(Phase.FORWARD)
    kept = [ledger.begin(sizes[0], LABEL), ledger.begin(sizes[1], LABEL)]
    for each in carried:
        ledger.end(each)
    ledger.use_on_stream(kept[0], 1)
    ledger.mark(Phase.BACKWARD)
    for size in sizes[2:]:
        ledger.touch(size, LABEL)
    ledger.mark(None)
    return kept


def step(ledger: Ledger, carried: Sequence[Allocation], count: int, run: int | None = None) -> list[Allocation]:
    """An optimizer step of so many micro-steps, after the third of which all but the last are done
    by the ledger alone if `run` is 3."""
    ledger.begin_step()
    starts: list[Instant] = []
    kept, number = list(carried), 0
    while number < count:
        starts.append(ledger.now())
        kept = micro_step(ledger, kept)
        if number + 1 == run:
            for mark in repeat_body(ledger, Body.of(ledger, starts[-2], starts[-1], ledger.now()), count - run - 1):
                ledger.mark(mark.phase)
            number = count - 2
        number += 1
    ledger.touch(5 * MIB, LABEL)
    return kept


def told(ledger: Ledger) -> tuple[Any, ...]:
    """What can be read from a ledger."""
    assert ledger.allocator is not None
    return ledger.allocated_bytes(), ledger.take_phase_peak(), ledger.peak_reserved, ledger.allocator.segments()


@pytest.mark.parametrize("count", [5, 6, 9, 16, 41])
@pytest.mark.parametrize("expandable", [False, True])
def test_the_ledger_ends_where_it_would_have_come_to(count: int, *, expandable: bool) -> None:
    """After two steps, and after steps that repeat the second; real holders of storages may let go
    of them at any time."""
    one, other = (Ledger(CachingAllocator(expandable_segments=expandable)) for _ in range(2))
    left: dict[Ledger, list[Allocation]] = {one: [], other: []}
    for _ in range(2):
        for ledger, run in ((one, None), (other, 3)):
            left[ledger] = step(ledger, left[ledger], count, run)
        assert told(one) == told(other)
    assert len(other.events) < len(one.events) or count < 9
    for _ in range(3):
        for ledger in (one, other):
            found = last_step(ledger)
            assert found is not None
            ledger.begin_step()
            for mark in repeat(ledger, found):
                ledger.mark(mark.phase)
        assert told(one) == told(other)
    for ledger in (one, other):
        for each in left[ledger]:
            ledger.end(each)
    assert told(one)[0] == told(other)[0]


class Counts(nn.Module):
    """A module of the user's own that knows how often it was called."""

    calls = 0
    odd: int | None = None


def watched(ledger: Ledger, changes: str, sizes: Sequence[Sequence[int]]) -> Body | None:
    """What the last of some micro-steps is found to be."""
    engine = Counts()
    tracker: Any = SimpleNamespace(ledger=ledger, host_bytes=0, index_of=lambda _: None)
    steps = MicroSteps([engine], tracker)
    steps.begin_step()
    kept: list[Allocation] = []
    found = None
    for number, each in enumerate(sizes):
        kept = micro_step(ledger, kept, each)
        if changes == "number":
            engine.calls = number
        elif changes == "cache" and number == len(sizes) - 1:
            ledger.empty_cache()
        found = steps.body(number)
    return found


def test_micro_steps_that_are_alike_are_found_so() -> None:
    assert watched(Ledger(CachingAllocator()), "", [SIZES] * (COMPARED + 1)) is not None


@pytest.mark.parametrize("changes", ["number", "cache"])
def test_a_number_of_the_users_model_or_an_emptied_cache_lets_everything_run(changes: str) -> None:
    assert watched(Ledger(CachingAllocator()), changes, [SIZES] * (COMPARED + 3)) is None


def test_other_storages_let_everything_run() -> None:
    growing = [(3 * MIB, 700, 9 * MIB, 40_000 + 512 * number) for number in range(7)]

    assert watched(Ledger(CachingAllocator()), "", growing) is None
