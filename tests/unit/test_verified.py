"""Plans that are tried: which are run dry, what becomes of those that fail, and what is said of
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jobs
import pytest

from bf16prof.cases import Job
from bf16prof.closed_form.predict import predict
from bf16prof.planning.answer import Answer, answer
from bf16prof.planning.judge import Judge
from bf16prof.planning.question import Question, powers_of_two
from bf16prof.planning.verified import tight_ones, verified
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import MemoryRecord
from bf16prof.reports import plan_rows
from bf16prof.verdict import Replays, judged
from bf16prof.vocabulary import Offload, Source, Verdict


class DryRuns:
    """Stands for the real engine: all fit but those whose turn is named."""

    def __init__(self, *failing: int, impossible: Sequence[int] = ()) -> None:
        self.tried: list[Job] = []
        self._failing, self._impossible = failing, impossible

    def __call__(self, jobs: Sequence[Job]) -> list[MemoryRecord | None]:
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> MemoryRecord | None:
        turn = len(self.tried)
        self.tried.append(job)
        if turn in self._impossible:
            return None
        found = predict(job, replays=Replays.ALL)
        reserved = (found.limit_bytes or 0) + 1 if turn in self._failing else found.run_peak_allocated_bytes
        return judged(dataclasses.replace(found, source=Source.SIMULATE, margin=None, reserved_bytes=reserved))


def question(memory_bytes: int = 24 << 30) -> Question:
    gpu = dataclasses.replace(find_gpu("a10-24gb"), id="small", memory_bytes=memory_bytes)
    profile = jobs.profile("gpt2-xl", model__num_layers=3, workload__sequence_length=256)
    return Question(profile, gpu, (1, 2, 3), ("bf16-fp32-master", "bf16-full"), powers_of_two(4), offloads=(Offload.NONE,))


@pytest.fixture(scope="module")
def predicted() -> Answer:
    found = answer(Judge(question()), 2)
    assert len(found.choices) > 5
    return found


def test_the_first_choices_are_tried_and_said_so(predicted: Answer) -> None:
    engine = DryRuns()

    found = verified(predicted, [], engine, 3)

    assert [job.case for job in engine.tried] == [plan.case for plan in predicted.outlook.plans[:3]]
    assert [plan.is_tried for plan in found.outlook.plans] == [True] * 3 + [False] * (len(predicted.choices) - 3)
    assert [plan.case for plan in found.outlook.plans] == [plan.case for plan in predicted.outlook.plans]
    assert "Tried: a dry run of the real engine says so of 1, 2, 3" in " ".join(plan_rows.order_text(found.outlook))
    assert "tried" in [cell.detail for cell in plan_rows.plan_rows(found.outlook.plans).rows[0]]


def test_a_choice_that_fails_is_marked_and_moves_down_and_the_next_is_tried(predicted: Answer) -> None:
    engine = DryRuns(0, 2)

    found = verified(predicted, [], engine, 3)

    first, second, third = predicted.outlook.plans[:3]
    assert [plan.case for plan in found.outlook.tried] == [first.case, third.case]
    assert all(plan.verdict is Verdict.TIGHT and plan.free_bytes == -1 for plan in found.outlook.tried)
    assert found.outlook.plans[0].case == second.case
    assert sum(plan.is_tried for plan in found.outlook.plans) == 3
    assert all(plan.fits for plan in found.outlook.plans)
    said = " ".join(plan_rows.order_text(found.outlook))
    assert f"Failed the dry run: {plan_rows.plan_words(first)}: tight" in said


def test_what_cannot_be_run_here_keeps_its_place_untried(predicted: Answer) -> None:
    found = verified(predicted, [], DryRuns(impossible=(0,)), 2)

    assert [plan.is_tried for plan in found.outlook.plans[:3]] == [False, True, True]


def test_where_all_fail_the_nearest_is_what_lacked_least(predicted: Answer) -> None:
    outlook = dataclasses.replace(predicted.outlook, plans=predicted.outlook.plans[:2])
    few = dataclasses.replace(predicted, outlook=outlook, choices=predicted.choices[:2])

    found = verified(few, [], DryRuns(0, 1), 3)

    assert found.choices == ()
    assert found.outlook.plans == ()
    assert found.outlook.nearest in found.outlook.tried


def test_what_is_tight_by_its_margin_fits_if_the_dry_run_says_so() -> None:
    # GIVEN a GPU on which the margin leaves nothing, and the bytes of something fit
    smallest = min(one.plan.peak_bytes for one in answer(Judge(question()), 2).choices)
    judge = Judge(question(int(smallest * 1.05) + (700 << 20)))
    nothing = answer(judge, 2)
    assert not nothing.choices
    candidates = tight_ones(judge.seen(2))
    assert candidates

    # WHEN that is run dry
    found = verified(nothing, candidates, DryRuns(), 1)

    # THEN it is a plan, and no more the nearest miss
    assert found.outlook.plans[0].fits
    assert found.outlook.plans[0].is_tried
    assert found.outlook.nearest is None
    assert found.outlook.plans[0].peak_bytes <= found.outlook.room.allocator_bytes
