"""Judge settings: by the estimate's verdict whether they fit, and by the floor of the step's time
how fast they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.cases import Job
from bf16prof.closed_form.calibration import Calibration
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.least import least_bytes
from bf16prof.closed_form.predict import predict
from bf16prof.engine.constraints import refusal_reason
from bf16prof.planning.question import Question, Setting
from bf16prof.plans import Plan
from bf16prof.profiles.schema import Profile
from bf16prof.records import MemoryRecord
from bf16prof.step_records import StepWork
from bf16prof.verdict import Replays
from bf16prof.vocabulary import Offload, Phase


@dataclass(frozen=True)
class Judged:
    """A setting with its job, its record and the plan that they make."""

    setting: Setting
    job: Job
    record: MemoryRecord
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether the plan fits."""
        return self.plan.fits


class Judge:
    """Judges the settings of a question, each once. With a calibration it predicts the time of
    steps that no offloading slows down.

    A setting is judged roughly, by its peak alone, or in full, with the allocator replayed, which
    takes ten times as long.
    """

    def __init__(self, question: Question, calibration: Calibration | None = None) -> None:
        self.question = question
        self.calibration = calibration
        self.left_out: dict[str, None] = {}
        """Why settings that DeepSpeed runs were not judged."""
        self.watch: Callable[[int], None] = lambda _: None
        """Told how many settings have been judged, after each."""
        self._jobs: dict[Setting, Job | None] = {}
        self._judged: dict[tuple[Setting, Replays], Judged | None] = {}

    def seen(self, world_size: int) -> list[Judged]:
        """What has been judged in full so far, of a number of GPUs."""
        full = (one for (_, replays), one in self._judged.items() if replays is Replays.DECISIVE)
        return list({id(one): one for one in full if one is not None and one.setting.world_size == world_size}.values())

    def first_asked(self, world_sizes: Sequence[int]) -> list[Job]:
        """The jobs of the smallest micro-batches, which are judged whatever comes of it."""
        settings = (setting for size in world_sizes for setting in self.question.combinations(size))
        return [job for setting in settings if refusal_reason(job := self.question.job(setting)) is None]

    def job(self, setting: Setting) -> Job | None:
        """The job of a setting; `None` if DeepSpeed refuses it or there is no closed form."""
        if setting not in self._jobs:
            self._jobs[setting] = self._admitted(self.question.job(setting))
        return self._jobs[setting]

    def fits(self, setting: Setting) -> bool:
        """Whether a setting fits, inside `zero.Init` if it has to be."""
        return self.may_fit(setting) and (found := self(setting)) is not None and found.fits

    def may_fit(self, setting: Setting) -> bool:
        """Whether the peak of a setting stays within the room."""
        room = self.question.room(setting.world_size).bytes
        return self.least_bytes(setting) <= room and (rough := self.roughly(setting)) is not None and rough.plan.peak_bytes <= room

    def least_bytes(self, setting: Setting) -> float:
        """What its peak is not below, inside `zero.Init` or not; infinite for what cannot be
        judged."""
        job = self.job(setting)
        least = None if job is None else least_bytes(job)
        if least is None:
            self.roughly(setting)  # which knows why
            return math.inf
        if self._may_go_inside(setting) and least > self.question.room(setting.world_size).bytes:
            return min(least, self.least_bytes(setting.but(zero_init=True)))
        return least

    def __call__(self, setting: Setting) -> Judged | None:
        """The setting, judged in full: inside `zero.Init` where ZeRO-3's init has no room for the
        whole model; `None` without a closed form."""
        return self._known(setting, Replays.DECISIVE)

    def roughly(self, setting: Setting) -> Judged | None:
        """The same by its peak alone: its verdict is none where the allocator decides."""
        return self._known(setting, Replays.NONE)

    def _known(self, setting: Setting, replays: Replays) -> Judged | None:
        if (setting, replays) not in self._judged:
            self._judged[setting, replays] = self._as_it_fits(setting, replays)
            self.watch(len(self._judged))
        return self._judged[setting, replays]

    def changed(self, setting: Setting, profile: Profile) -> Judged | None:
        """The setting with another profile in the place of the question's."""
        job = self._admitted(self.question.job(setting, profile))
        return None if job is None else self._predicted(setting, job, Replays.DECISIVE)

    def _admitted(self, job: Job) -> Job | None:
        if refusal_reason(job) is not None:
            return None
        if gap := closed_form_gap(job):
            self.left_out[f"no closed form: {gap}"] = None
            return None
        return job

    def _as_it_fits(self, setting: Setting, replays: Replays) -> Judged | None:
        job = self.job(setting)
        found = None if job is None else self._predicted(setting, job, replays)
        if found is None or not self._may_go_inside(setting):
            return found
        init = found.record.phases[Phase.INIT].peak_bytes or 0
        is_too_large = init > self.question.room(setting.world_size).bytes
        if found.fits or not (is_too_large or found.plan.peak_phase is Phase.INIT):
            return found
        inside = self._known(setting.but(zero_init=True), replays)
        return inside if inside is not None and (inside.fits or is_too_large) else found

    def _may_go_inside(self, setting: Setting) -> bool:
        return self.question.may_change_init and setting.can_be_inside_zero_init

    def _predicted(self, setting: Setting, job: Job, replays: Replays) -> Judged | None:
        record = predict(job, self.question.gpus_per_node, self.question.allocator, replays)
        peak, work = record.run_peak_allocated_bytes, record.work
        if peak is None or work is None:
            self.left_out |= dict.fromkeys(record.notes)
            return None
        return Judged(setting, job, record, self._plan(setting, job, record, peak, work))

    def _plan(self, setting: Setting, job: Job, record: MemoryRecord, peak: int, work: StepWork) -> Plan:
        tokens, floor, calibrated = work.tokens * setting.world_size, record.step_time_floor_s, self._step_time_s(setting, work)
        return plan_of(
            self.question,
            setting,
            job,
            record,
            peak_bytes=peak,
            peak_phase=next(phase for phase, memory in record.phases.items() if memory.peak_bytes == peak),
            free_bytes=self.question.room(setting.world_size).bytes - (record.reserved_bytes or peak),
            step_time_floor_s=floor,
            tokens_per_s_at_most=tokens / floor if floor else None,
            step_time_s=calibrated,
            tokens_per_s=tokens / calibrated if calibrated else None,
            verdict=record.verdict,
            reserved_bytes=record.reserved_bytes,
            inside_zero_init_bytes=record.inside_zero_init_bytes,
        )

    def _step_time_s(self, setting: Setting, work: StepWork) -> float | None:
        if self.calibration is None or setting.offload is not Offload.NONE:
            return None
        return self.calibration.predict(work)


def plan_of(question: Question, setting: Setting, job: Job, record: MemoryRecord, **judged: Any) -> Plan:
    """The plan of a setting; `judged`: what a source says of its memory and time."""
    workload = job.profile.workload
    return Plan(
        case=job.case,
        sequence_length=workload.sequence_length,
        micro_batch_size=workload.micro_batch_size,
        largest_micro_batch_size=workload.micro_batch_size,
        gradient_accumulation_steps=workload.gradient_accumulation_steps,
        train_batch_size=question.sequences(job),
        activation_checkpointing=workload.activation_checkpointing,
        zero_init=setting.zero_init,
        learning=job.recipe.learning,
        host_bytes=record.host_bytes or 0,
        host_bytes_per_node=record.host_bytes_per_node or 0,
        **judged,
    )
