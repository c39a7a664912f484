"""From a job to its record: the steady state in closed form. What is not known yet - peaks, reserved memory, time - stays null."""

from __future__ import annotations

from bf16prof.cases import Job
from bf16prof.engine.config import deepspeed_config, engine_facts
from bf16prof.estimate.device import gpu_additions
from bf16prof.estimate.kept import kept_by_the_loop
from bf16prof.estimate.steady import Engine, model_states
from bf16prof.models.shapes import inventory
from bf16prof.records import Device, Item, MemoryRecord, Phase, PhaseMemory, Source, by_component


def predict(job: Job) -> MemoryRecord:
    """The record of a job that DeepSpeed runs (`engine.constraints.admit`).

    On a GPU, `host_bytes` are what offloading keeps in host memory; CPU ranks have one memory, which holds both.
    """
    config = deepspeed_config(job)
    parameters = inventory(job.profile.model)
    states = model_states(Engine(config, parameters, job.case.world_size, job.device))
    tensors = states + kept_by_the_loop(job.profile, engine_facts(config))
    host = [] if job.device is Device.CPU else [a for a in tensors if a.on_host]
    device = [a for a in tensors if a not in host]
    if job.device is Device.GPU:
        assert job.gpu is not None, "a prediction for a GPU needs one"
        device += gpu_additions(device, job.gpu)
    items = tuple(Item(a.component, a.name, a.bytes, a.source) for a in device if a.bytes)
    components = by_component(items)
    return MemoryRecord(
        source=Source.ESTIMATE,
        case=job.case,
        device=job.device,
        gpu=job.gpu.id if job.gpu else None,
        parameters=sum(p.numel for p in parameters),
        allocated_bytes=sum(components.values()),
        components=components,
        phases={phase: PhaseMemory() for phase in Phase},
        items=items,
        host_bytes=sum(a.bytes for a in host) if job.device is Device.GPU else None,
    )
