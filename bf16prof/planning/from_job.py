"""What one job lacks, and which changes of it fit: a plan that begins at what the user runs."""

from __future__ import annotations

from bf16prof.cases import STAGES, Job
from bf16prof.planning.advice import all_changes, single_changes
from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.question import Question, Setting, powers_of_two
from bf16prof.plans import Change
from bf16prof.profiles.gpus import Gpu
from bf16prof.profiles.recipes import runnable_recipes

_LARGEST_MICRO_BATCH = 64


def judge_of(job: Job, gpu: Gpu) -> tuple[Judge, Judged | None]:
    """The judge of a job on a GPU, and the job judged; `None` where it has no closed form."""
    workload = job.profile.workload
    question = Question(
        job.profile,
        gpu,
        stages=STAGES,
        recipes=tuple(dict.fromkeys([job.case.recipe, *runnable_recipes()])),
        micro_batches=tuple(sorted({*powers_of_two(_LARGEST_MICRO_BATCH), workload.micro_batch_size})),
    )
    judge = Judge(question)
    setting = Setting(
        stage=job.case.zero_stage,
        world_size=job.case.world_size,
        recipe=job.case.recipe,
        offload=job.case.offload,
        micro_batch_size=workload.micro_batch_size,
        checkpointing=workload.activation_checkpointing,
        zero_init=workload.zero_init,
        sequence_length=workload.sequence_length,
    )
    return judge, judge(setting)


def what_gives_back(job: Job, gpu: Gpu) -> list[Change]:
    """The single changes of a job that save memory, the most effective first; none where it has no
    closed form."""
    from bf16prof.closed_form.gap import closed_form_gap

    if closed_form_gap(job):
        return []
    judge, start = judge_of(job, gpu)
    return single_changes(judge, start) if start else []


def changes_of(judge: Judge, start: Judged, missing_bytes: int = 0) -> tuple[list[Change], list[Change]]:
    """The changes of a job that fit, and the others that save memory, each the best first.

    `missing_bytes`: what the prediction of the job is known to lack. It is taken to be missing
    after a change as well.
    """
    fits: list[Change] = []
    others: list[Change] = []
    for change in all_changes(judge, start):
        enough = change.plan.fits and change.plan.free_bytes >= missing_bytes
        (fits if enough else others).append(change)
    return fits, others
