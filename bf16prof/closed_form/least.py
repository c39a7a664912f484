"""What a job needs at least: a lower bound of its whole-run peak that needs no walk through a
step."""

from __future__ import annotations

from bf16prof.cases import Job
from bf16prof.closed_form.between_steps import between_steps
from bf16prof.closed_form.device import gpu_additions
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.gap import peaks_gap
from bf16prof.closed_form.initial import after_init
from bf16prof.vocabulary import Phase


def least_bytes(job: Job) -> int | None:
    """The larger of what a job on a GPU holds between two steps and the peak of init, which
    `zero.Init` changes and which is left out then.

    `None` where peaks have no closed form.
    """
    assert job.gpu is not None, "the job is for a GPU"
    engine = Engine.of(job)
    if peaks_gap(job, engine):
        return None
    held = [a for a in between_steps(job, engine) if not a.on_host]
    steady = sum(a.bytes for a in [*held, *gpu_additions(held, job.gpu)])
    if job.is_inside_zero_init:
        return steady
    return max(steady, after_init(job, engine, zero_init=False).peaks[Phase.INIT].level)
