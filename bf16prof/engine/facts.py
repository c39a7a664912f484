"""What the engine of a job makes of it: dtypes, wrapper, optimizer. Imports no torch."""

from __future__ import annotations

from bf16prof.cases import Job
from bf16prof.engine.config import EngineFacts, deepspeed_config, engine_facts
from bf16prof.engine.megatron.settings import megatron_facts


def facts_of(job: Job) -> EngineFacts:
    """What DeepSpeed makes of a job, or what megatron-core does, whichever it is for."""
    return megatron_facts(job) if job.profile.is_for_megatron else engine_facts(deepspeed_config(job))
