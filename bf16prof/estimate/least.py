"""What a job needs at least: a lower bound of its whole-run peak that needs no walk through a step."""

from __future__ import annotations

from bf16prof.cases import Job
from bf16prof.engine.config import deepspeed_config
from bf16prof.estimate.device import gpu_additions
from bf16prof.estimate.gap import peaks_gap
from bf16prof.estimate.initial import initial
from bf16prof.estimate.kept import kept_by_the_loop, model_buffers
from bf16prof.estimate.passes import Meter
from bf16prof.estimate.steady import Engine, model_states
from bf16prof.estimate.training import block_bytes
from bf16prof.models.shapes import inventory
from bf16prof.records import Phase


def least_bytes(job: Job) -> int | None:
    """The larger of what a job on a GPU holds between two steps and the peak of init, which `zero.Init` changes and which is left out then.

    `None` where peaks have no closed form.
    """
    assert job.gpu is not None, "the job is for a GPU"
    engine = Engine(deepspeed_config(job), inventory(job.profile.model), job.case.world_size, job.device)
    if peaks_gap(job, engine):
        return None
    tensors = [*model_states(engine), *model_buffers(job, engine.facts), *kept_by_the_loop(job.profile, engine.facts)]
    held = [a for a in tensors if not a.on_host]
    steady = sum(a.bytes for a in [*held, *gpu_additions(held, job.gpu)])
    if job.profile.workload.zero_init and job.case.zero_stage == 3:
        return steady
    meter = Meter(block_bytes(job))
    initial(engine, meter)
    return max(steady, meter.peaks[Phase.INIT].level)
