"""From a job to its record, in closed form: the steady state, the peak of every phase, and the work of a step with a floor of its time.

The time of the step itself stays null. Of reserved memory only a floor is known: how much more the caching allocator takes depends on the
order of allocations and on what it finds free, which a dry run replays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.workload import workload_of
from bf16prof.estimate.allocation import Allocation
from bf16prof.estimate.device import gpu_additions
from bf16prof.estimate.gap import closed_form_gap, peaks_gap, work_gap
from bf16prof.estimate.kept import between_steps
from bf16prof.estimate.peaks import peaks
from bf16prof.estimate.roofline import engine_work, tf32_note
from bf16prof.estimate.steady import Engine
from bf16prof.estimate.training import Walked, walked
from bf16prof.profiles.gpus import ALLOCATOR_SEGMENT_BYTES, GPUS_PER_NODE
from bf16prof.records import Device, Item, MemoryRecord, Phase, PhaseMemory, Source, StepWork, by_component, peak_phase
from bf16prof.rounding import round_up

UNKNOWN = {phase: PhaseMemory() for phase in Phase}


def predict(job: Job, per_node: int = GPUS_PER_NODE) -> MemoryRecord:
    """The record of a job that has a closed form (`gap.closed_form_gap`) and that DeepSpeed runs (`engine.constraints.admit`).

    `per_node`: so many GPUs share a node. On a GPU, `host_bytes` are what offloading keeps in host memory; CPU ranks have one memory, which
    holds both. Peaks stay null, with the reason in the notes, where their closed form has not been held against the dry run.
    """
    engine = Engine.of(job)
    tensors = between_steps(job, engine)
    no_peaks, no_work = peaks_gap(job, engine), work_gap(job, engine)
    done = None if no_peaks and no_work else walked(job, engine)
    work = None if done is None or no_work else engine_work(job, engine, done, per_node)
    host = [] if job.device is Device.CPU else [a for a in tensors if a.on_host]
    items = _items(job, [a for a in tensors if a not in host])
    components = by_component(items)
    return MemoryRecord(
        source=Source.ESTIMATE,
        case=job.case,
        device=job.device,
        gpu=job.gpu.id if job.gpu else None,
        workload=workload_of(job),
        parameters=sum(engine.numels),
        allocated_bytes=sum(components.values()),
        components=components,
        items=items,
        host_bytes=sum(a.bytes for a in host) if job.device is Device.GPU else None,
        **({"phases": UNKNOWN} if done is None or no_peaks else _peaks(job, engine, done, items)),
        work=work,
        step_time_floor_s=work.step_time_floor_s if work else None,
        notes=_notes(job, no_peaks, no_work, work),
    )


def predictions(jobs: Sequence[Job], per_node: int = GPUS_PER_NODE) -> list[MemoryRecord]:
    """The records of those jobs that have a closed form."""
    return [predict(job, per_node) for job in jobs if closed_form_gap(job) is None]


def with_work(records: Sequence[MemoryRecord]) -> list[MemoryRecord]:
    """These records, each with the work that the estimate among them counts for the same case, if it has none of its own."""
    known = {(r.case, r.device, r.gpu): r.work for r in records if r.source is Source.ESTIMATE and r.work}

    def complete(record: MemoryRecord) -> MemoryRecord:
        work = known.get((record.case, record.device, record.gpu))
        return record if record.work or not work else dataclasses.replace(record, work=work, step_time_floor_s=work.step_time_floor_s)

    return [complete(record) for record in records]


def _items(job: Job, device: Sequence[Allocation]) -> tuple[Item, ...]:
    allocations = list(device)
    if job.device is Device.GPU:
        assert job.gpu is not None, "a prediction for a GPU needs one"
        allocations += gpu_additions(allocations, job.gpu)
    return tuple(Item(*a.label, a.bytes, a.source) for a in allocations if a.bytes)


def _notes(job: Job, no_peaks: str | None, no_work: str | None, work: StepWork | None) -> tuple[str, ...]:
    missing = [f"no peaks in closed form: {no_peaks}; bf16prof simulate finds them"] if no_peaks else []
    missing += [f"no work of a step in closed form: {no_work}"] if no_work else []
    tf32 = tf32_note(job, work) if work else None
    return (*missing, tf32) if tf32 else tuple(missing)


def _peaks(job: Job, engine: Engine, done: Walked, steady: Sequence[Item]) -> dict[str, Any]:
    """The fields of the record that say how high each phase goes, and what is alive at the training peak."""
    found = peaks(job, engine, done, steady)
    highest = peak_phase(found.phases)
    assert highest is not None, "every phase is predicted"
    alive = found.items(highest)
    run_peak = max(memory.peak_bytes or 0 for memory in found.phases.values())
    return {
        "phases": dict(found.phases),
        "peak_allocated_bytes": found.phases[highest].peak_bytes,
        "peak_phase": highest,
        "peak_items": alive,
        "peak_components": by_component(alive),
        "run_peak_allocated_bytes": run_peak,
        "reserved_floor_bytes": round_up(run_peak, ALLOCATOR_SEGMENT_BYTES),
    }
