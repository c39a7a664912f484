"""From a job to its record, in closed form: the steady state, and the peak of every phase. Reserved memory and time stay null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.config import deepspeed_config
from bf16prof.estimate.allocation import Allocation
from bf16prof.estimate.device import gpu_additions
from bf16prof.estimate.gap import peaks_gap
from bf16prof.estimate.kept import kept_by_the_loop, model_buffers
from bf16prof.estimate.peaks import peaks
from bf16prof.estimate.steady import Engine, model_states
from bf16prof.models.shapes import inventory
from bf16prof.records import Device, Item, MemoryRecord, Phase, PhaseMemory, Source, by_component, peak_phase


def predict(job: Job) -> MemoryRecord:
    """The record of a job that has a closed form (`gap.closed_form_gap`) and that DeepSpeed runs (`engine.constraints.admit`).

    On a GPU, `host_bytes` are what offloading keeps in host memory; CPU ranks have one memory, which holds both. Peaks stay null, with the
    reason in the notes, where their closed form has not been held against the dry run.
    """
    config = deepspeed_config(job)
    engine = Engine(config, inventory(job.profile.model), job.case.world_size, job.device)
    tensors = [*model_states(engine), *model_buffers(job, engine.facts), *kept_by_the_loop(job.profile, engine.facts)]
    host = [] if job.device is Device.CPU else [a for a in tensors if a.on_host]
    items = _items(job, [a for a in tensors if a not in host])
    components = by_component(items)
    return MemoryRecord(
        source=Source.ESTIMATE,
        case=job.case,
        device=job.device,
        gpu=job.gpu.id if job.gpu else None,
        parameters=sum(engine.numels),
        allocated_bytes=sum(components.values()),
        components=components,
        items=items,
        host_bytes=sum(a.bytes for a in host) if job.device is Device.GPU else None,
        **_peaks(job, engine, items),
    )


def _items(job: Job, device: Sequence[Allocation]) -> tuple[Item, ...]:
    allocations = list(device)
    if job.device is Device.GPU:
        assert job.gpu is not None, "a prediction for a GPU needs one"
        allocations += gpu_additions(allocations, job.gpu)
    return tuple(Item(a.component, a.name, a.bytes, a.source) for a in allocations if a.bytes)


def _peaks(job: Job, engine: Engine, steady: Sequence[Item]) -> dict[str, Any]:
    """The fields of the record that say how high each phase goes, and what is alive at the training peak."""
    if gap := peaks_gap(job, engine):
        return {
            "phases": {phase: PhaseMemory() for phase in Phase},
            "notes": (f"no peaks in closed form: {gap}; bf16prof simulate finds them",),
        }
    found = peaks(job, engine, steady)
    highest = peak_phase(found.phases)
    assert highest is not None, "every phase is predicted"
    alive = found.items(highest)
    return {
        "phases": dict(found.phases),
        "peak_allocated_bytes": found.phases[highest].peak_bytes,
        "peak_phase": highest,
        "peak_items": alive,
        "peak_components": by_component(alive),
        "run_peak_allocated_bytes": max(memory.peak_bytes or 0 for memory in found.phases.values()),
    }
