"""Plans of jobs whose peaks have no closed form, as of ranks that share a batch: few settings, each
judged by a dry run of the real engine.

For each kind of offloading the setting that needs least (the highest stage, layers recomputed) is
run, all together. The least offloading that fits is looked at further: without recomputation, at
the lower stages, and at larger micro-batches until one does not fit. What is not run is not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.constraints import refusal_reason
from bf16prof.planning.advice import beyond
from bf16prof.planning.answer import Answer, nothing_to_judge
from bf16prof.planning.judge import Judge, Judged, plan_of
from bf16prof.planning.question import Question, Setting
from bf16prof.planning.verified import DryRun, tried
from bf16prof.plans import Limits, Outlook
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Offload, Phase

STEPS = 2
"""So many micro-batches are run together, each twice the one before."""


def answer_by_dry_runs(judge: Judge, world_size: int, dry_run: DryRun) -> Answer:
    """Everything about one number of GPUs that few dry runs tell, the first choice first.

    Raises `InputError` where there is no combination, or DeepSpeed runs none.
    """
    search = _SettingSearch(judge.question, dry_run)
    possible = [setting for setting in inside(judge.question, world_size) if refusal_reason(judge.question.job(setting)) is None]
    if not possible:
        raise nothing_to_judge(judge, world_size)
    frugal = [min(level, key=_appetite) for offload in Offload if (level := [s for s in possible if s.offload is offload])]
    found = search.run(frugal)
    best = next((one for one in found if one.fits), None)
    choices = [] if best is None else sorted(_further(search, judge.question, possible, best), key=_preference)
    nearest = None if choices else max(found, key=lambda one: one.plan.free_bytes, default=None)
    outlook = Outlook(
        world_size=world_size,
        room=judge.question.room(world_size),
        plans=tuple(choice.plan for choice in choices),
        complete=True,
        combinations=len(possible),
        left_out=(
            f"all but the {search.count} settings that were run dry; there are {len(possible)} combinations, and micro-batches of each",
        ),
        limits=Limits((), are_known=False),
        nearest=nearest.plan if nearest else None,
        beyond=tuple(beyond(nearest)) if nearest else (),
    )
    return Answer(outlook, tuple(choices), judge)


class _SettingSearch:
    """Runs settings dry and counts them."""

    def __init__(self, question: Question, dry_run: DryRun) -> None:
        self.question, self.count = question, 0
        self._dry_run = dry_run

    def run(self, settings: Sequence[Setting]) -> list[Judged]:
        """The settings that could be run, judged."""
        jobs = [self.question.job(setting) for setting in settings]
        records = self._dry_run(jobs) if jobs else []
        self.count += len(jobs)
        return [
            judged_dry(self.question, setting, job, record)
            for setting, job, record in zip(settings, jobs, records, strict=True)
            if record is not None
        ]


def inside(question: Question, world_size: int) -> Iterable[Setting]:
    """All combinations, ZeRO-3 inside `zero.Init` unless somebody has said otherwise."""
    for setting in question.combinations(world_size):
        yield setting.but(zero_init=True) if question.may_change_init and setting.stage == 3 else setting


def _appetite(setting: Setting) -> tuple[int, bool]:
    return -setting.stage, not setting.checkpointing


def _preference(one: Judged) -> tuple[bool, int, int]:
    """Without recomputation first, then the lowest stage, then the largest micro-batch: how fast
    they are is not known."""
    return one.setting.checkpointing, one.setting.stage, -one.setting.micro_batch_size


def _further(search: _SettingSearch, question: Question, possible: Sequence[Setting], best: Judged) -> list[Judged]:
    """The setting that fits, and what else does that asks for more memory or a larger
    micro-batch."""
    start = best.setting
    like = [s for s in possible if s.offload is start.offload and s.recipe == start.recipe and s != start]
    others = [s for s in like if s.stage == start.stage] + [s for s in like if s.stage == start.stage - 1 and s.checkpointing]
    found = [best, *(one for one in search.run(others) if one.fits)]
    first = min(found, key=_preference)
    sizes = [size for size in question.sizes(start.world_size) if size > start.micro_batch_size]
    while sizes:
        batch, sizes = sizes[:STEPS], sizes[STEPS:]
        larger = [one for one in search.run([first.setting.but(micro_batch_size=size) for size in batch]) if one.fits]
        found += larger
        if len(larger) < len(batch):
            break
    return found


def judged_dry(question: Question, setting: Setting, job: Job, record: MemoryRecord, **more: Any) -> Judged:
    """A setting by its dry run, which says all of its memory but what is free (`verified.tried`);
    `more`: what else its plan says."""
    peak, phase = record.run_peak_allocated_bytes or 0, record.peak_phase or Phase.BACKWARD
    said = {"peak_bytes": peak, "peak_phase": phase, "free_bytes": 0, "step_time_floor_s": None, "tokens_per_s_at_most": None}
    return tried(Judged(setting, job, record, plan_of(question, setting, job, record, **said, **more)), record)
