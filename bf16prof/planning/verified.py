"""Plans that have been tried: their first choices run dry, and the verdict of the dry run in the
place of the estimate's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace

from bf16prof.cases import Job
from bf16prof.planning.answer import Answer
from bf16prof.planning.judge import Judged
from bf16prof.plans import Outlook
from bf16prof.records import MemoryRecord
from bf16prof.verdict import judge, most_allocated
from bf16prof.vocabulary import Verdict

MOST_ROUNDS = 3
"""So often further choices are tried, where earlier ones have failed."""

DryRun = Callable[[Sequence[Job]], Sequence[MemoryRecord | None]]
"""Runs jobs dry; their records, in their order, and `None` for those that cannot be run here."""


def verified(answer: Answer, candidates: Sequence[Judged], dry_run: DryRun, count: int) -> Answer:
    """The answer with its first choices tried: those that fail the dry run go to the end, and the
    next ones are tried in their place.

    `count`: so many are to have passed. `candidates`: where nothing fits with the margin kept,
    those that a dry run may show to fit.
    """
    waiting = list(answer.choices) or list(candidates[:count])
    kept: list[Judged] = []
    failed: list[Judged] = []
    for _ in range(MOST_ROUNDS):
        missing = count - sum(choice.plan.is_tried for choice in kept)
        batch, waiting = waiting[:missing], waiting[missing:]
        for choice, record in zip(batch, dry_run([choice.job for choice in batch]) if batch else (), strict=True):
            judged = choice if record is None else tried(choice, record)
            (kept if judged.fits else failed).append(judged)
    choices = (*kept, *(waiting if answer.choices else ()))
    outlook = replace(
        answer.outlook,
        plans=tuple(choice.plan for choice in choices),
        tried=tuple(choice.plan for choice in failed),
        nearest=answer.outlook.nearest if not choices else None,
    )
    return replace(answer, outlook=_with_a_nearest(outlook, failed), choices=choices)


def _with_a_nearest(outlook: Outlook, failed: Sequence[Judged]) -> Outlook:
    """Where all that seemed to fit has failed, the nearest is the one that lacks least in the dry
    run."""
    if outlook.plans or outlook.nearest is not None:
        return outlook
    return replace(outlook, nearest=max((choice.plan for choice in failed), key=lambda plan: plan.free_bytes))


def tried(choice: Judged, record: MemoryRecord) -> Judged:
    """The choice with what its dry run says: its peak, what it reserves, and the verdict, for which
    no margin is kept."""
    found, peak = judge(record), most_allocated(record) or choice.plan.peak_bytes
    assert found is not None, "a dry run on a GPU is judged"
    plan = dataclasses.replace(
        choice.plan,
        peak_bytes=peak,
        peak_phase=found.phase or choice.plan.peak_phase,
        reserved_bytes=record.reserved_bytes,
        free_bytes=(found.limit_bytes or 0) - (record.reserved_bytes or peak),
        verdict=found.verdict,
        is_tried=True,
    )
    return dataclasses.replace(choice, plan=plan)


def tight_ones(judged: Sequence[Judged]) -> list[Judged]:
    """Those whose bytes fit, the lowest peak first."""
    return sorted((one for one in judged if one.plan.verdict is Verdict.TIGHT), key=lambda one: one.plan.peak_bytes)
