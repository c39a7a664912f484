"""How far the closed form of a job is from its dry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.closed_form.predict import predict
from bf16prof.dry_run.runner import Options, simulate
from bf16prof.profiles.models import ModelSettings
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import TRAINING, Phase

REMAINDERS = "remainders of blocks too small to be split off"


@dataclass(frozen=True)
class Judgement:
    """A job's errors: signed bytes of the steady state and of the end of every phase, and relative
    ones of the peak of every phase.

    `margin`: by how much the highest training phase is above the second; `dry`: the record that was
    judged against.
    """

    job: Job
    dry: MemoryRecord
    steady_error_bytes: int
    end_error_bytes: Mapping[Phase, int]
    errors: Mapping[Phase, float]
    margin: float
    names_the_phase: bool

    @property
    def worst(self) -> float:
        """The error that is farthest from zero."""
        return max(self.errors.values(), key=abs)

    @property
    def label(self) -> str:
        """The case, and enough of its profile to find it again."""
        model, workload, zero = self.job.profile.model, self.job.profile.workload, self.job.profile.deepspeed.zero_optimization
        shape = str(model.family)
        if isinstance(model, ModelSettings):
            shape += f" {model.num_layers} x {model.hidden_size}, vocabulary {model.vocab_size}"
        work = f"{workload.micro_batch_size} x {workload.sequence_length} x {workload.gradient_accumulation_steps}"
        checkpointing = ", checkpointing" if workload.activation_checkpointing else ""
        return f"{self.job.case.label}, {shape}, {work}{checkpointing}, reduce bucket {zero.reduce_bucket_size}"


def judge(jobs: Sequence[Job], options: Options | None = None) -> list[Judgement]:
    """Predict and dry-run the jobs."""
    return [judged_against(job, dry) for job, dry in zip(jobs, simulate(jobs, options=options), strict=True)]


def judged_against(job: Job, dry: MemoryRecord) -> Judgement:
    """Predict a job whose dry run is known."""
    closed = predict(job)
    steady = (dry.allocated_bytes or 0) - sum(item.bytes for item in dry.items if item.name == REMAINDERS)
    errors = {phase: (closed.phases[phase].peak_bytes or 0) / (dry.phases[phase].peak_bytes or 1) - 1 for phase in closed.phases}
    first, second = sorted((dry.phases[phase].peak_bytes or 0 for phase in TRAINING), reverse=True)[:2]
    rest = dry.allocated_bytes - steady if dry.allocated_bytes else 0
    ends = {phase: (closed.phases[phase].end_bytes or 0) - (dry.phases[phase].end_bytes or 0) for phase in closed.phases}
    ends[Phase.STEP] += rest
    return Judgement(
        job, dry, (closed.allocated_bytes or 0) - steady, ends, errors, first / second - 1, closed.peak_phase is dry.peak_phase
    )
