"""From a job to its record, in closed form: the steady state, the peak of every phase, and the work
of a step with a floor of its time.

The time of the step itself stays null. What the caching allocator reserves depends on the order of
allocations and on what it finds free: that is replayed (`replay.py`) where the verdict turns on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.cases import Job
from bf16prof.closed_form.allocation import Storages
from bf16prof.closed_form.between_steps import between_steps
from bf16prof.closed_form.device import gpu_additions
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.gap import closed_form_gap, evaluation_gap, init_gap, peaks_gap, work_gap
from bf16prof.closed_form.initial import after_init
from bf16prof.closed_form.peaks import init_memory, peaks
from bf16prof.closed_form.replay import replay
from bf16prof.closed_form.roofline import engine_work, tf32_note
from bf16prof.closed_form.training import walked
from bf16prof.closed_form.walks import Walked
from bf16prof.engine.workload import workload_of
from bf16prof.profiles.gpus import ALLOCATOR_SEGMENT_BYTES, GPUS_PER_NODE
from bf16prof.records import Item, MemoryRecord, by_component, peak_phase
from bf16prof.rounding import round_up
from bf16prof.step_records import PhaseMemory, StepWork
from bf16prof.verdict import Allocator, Replays, gpu_limit, is_surely_within, judged, room_bytes
from bf16prof.vocabulary import TRAINING, Device, Phase, Source

USUAL = Allocator()
"""With default segments and the usual margin."""

UNKNOWN = {phase: PhaseMemory() for phase in (Phase.INIT, *TRAINING)}


PEAKS = ("peak_allocated_bytes", "run_peak_allocated_bytes")
"""What an evaluation that is not predicted may exceed."""


def predict(job: Job, per_node: int = GPUS_PER_NODE, allocator: Allocator = USUAL, replays: Replays = Replays.DECISIVE) -> MemoryRecord:
    """The record of a job that has a closed form (`gap.closed_form_gap`) and that its engine runs
    (`engine.constraints.admit`).

    `per_node`: so many GPUs share a node. `allocator`: how it is set; `replays`: whether it is
    replayed. On a GPU, `host_bytes` are what offloading keeps in host memory; CPU ranks have one
    memory, which holds both. Peaks stay null, with the reason in the notes, where their closed form
    has not been held against the dry run.
    """
    engine = Engine.of(job)
    tensors = between_steps(job, engine)
    no_peaks, no_work = peaks_gap(job, engine), work_gap(job, engine)
    done = None if no_peaks and no_work else walked(job, engine)
    work = None if done is None or no_work else engine_work(job, engine, done, per_node)
    host = [] if job.device is Device.CPU else [a for a in tensors if a.on_host]
    items = _items(job, [a for a in tensors if a not in host])
    components = by_component(items)
    on_host = sum(a.bytes for a in host)
    record = MemoryRecord(
        source=Source.ESTIMATE,
        case=job.case,
        device=job.device,
        gpu=job.gpu.id if job.gpu else None,
        workload=workload_of(job),
        parameters=sum(engine.all_numels),
        allocated_bytes=sum(components.values()),
        components=components,
        items=items,
        host_bytes=on_host if job.device is Device.GPU else None,
        host_bytes_per_node=on_host * min(per_node, job.case.world_size) if job.device is Device.GPU else None,
        **({"phases": _init_alone(job, engine)} if done is None or no_peaks else _peaks(job, engine, done, items)),
        work=work,
        step_time_floor_s=work.step_time_floor_s if work else None,
        at_least=PEAKS if evaluation_gap(job) and not no_peaks else (),
        notes=_notes(job, no_peaks, no_work, work),
    )
    reserve = Reserve(job, engine, None if no_peaks else done, allocator, replays)
    return judged(reserve.added_to(record))


def _init_alone(job: Job, engine: Engine) -> dict[Phase, PhaseMemory]:
    """The phases of a job whose passes are not known: init, which runs none."""
    return UNKNOWN if init_gap(job, engine) else {**UNKNOWN, Phase.INIT: init_memory(job, engine)}


def predictions(jobs: Sequence[Job], per_node: int = GPUS_PER_NODE, allocator: Allocator = USUAL) -> list[MemoryRecord]:
    """The records of those jobs that have a closed form."""
    return [predict(job, per_node, allocator) for job in jobs if closed_form_gap(job) is None]


@dataclass(frozen=True)
class Reserve:
    """What the caching allocator of a job may reserve, and what it does: `done`, the walk through a
    step, where peaks are known."""

    job: Job
    engine: Engine
    done: Walked | None
    allocator: Allocator
    replays: Replays

    def added_to(self, record: MemoryRecord) -> MemoryRecord:
        """The record with the limit of its GPU, and with what is reserved where that decides
        (`verdict.judge`)."""
        gpu = self.job.gpu
        if gpu is None:
            return record
        limit, margin = gpu_limit(gpu, self.job.case.world_size), self.allocator.share_to_keep
        peak, room = record.run_peak_allocated_bytes, room_bytes(limit, margin)
        record = dataclasses.replace(record, limit_bytes=limit, margin=margin)
        if self.done is None or peak is None:
            return record
        if peak > limit:
            return dataclasses.replace(record, inside_zero_init_bytes=self._inside_zero_init(record, limit))
        decides = not is_surely_within(peak, room) and peak <= room
        if self.replays is Replays.ALL or (decides and self.replays is Replays.DECISIVE):
            return self._replayed(record, self.done, room, limit)
        return record

    def _replayed(self, record: MemoryRecord, done: Walked, room: int, limit: int) -> MemoryRecord:
        to_the_end, expandable = self.replays is Replays.ALL, self.allocator.expandable
        found = replay(self.job, self.engine, done, limit=room, expandable=expandable, to_the_end=to_the_end)
        if found.shortage is not None and room < limit and to_the_end:
            found = replay(self.job, self.engine, done, limit=limit, expandable=expandable)
        return dataclasses.replace(
            record,
            reserved_bytes=found.reserved_bytes,
            reserved_floor_bytes=None,
            fragmentation_bytes=found.fragmentation_bytes,
            allocator_retries=found.retries,
        )

    def _inside_zero_init(self, record: MemoryRecord, limit: int) -> int | None:
        """The whole-run peak built inside `zero.Init`, where only init does not fit and ZeRO-3
        builds the whole model first."""
        training = record.peak_allocated_bytes or 0
        if training > limit or self.job.case.zero_stage != 3 or self.job.is_inside_zero_init:
            return None
        return max(training, after_init(self.job, self.engine, zero_init=True).peaks[Phase.INIT].level)


def with_work(records: Sequence[MemoryRecord]) -> list[MemoryRecord]:
    """These records, each with the work that the estimate among them counts for the same case, if
    it has none of its own."""
    known = {(r.case, r.device, r.gpu): r.work for r in records if r.source is Source.ESTIMATE and r.work}

    def complete(record: MemoryRecord) -> MemoryRecord:
        work = known.get((record.case, record.device, record.gpu))
        return record if record.work or not work else dataclasses.replace(record, work=work, step_time_floor_s=work.step_time_floor_s)

    return [complete(record) for record in records]


def _items(job: Job, device: Sequence[Storages]) -> tuple[Item, ...]:
    allocations = list(device)
    if job.device is Device.GPU:
        assert job.gpu is not None, "a prediction for a GPU needs one"
        allocations += gpu_additions(allocations, job.gpu)
    return tuple(Item(*a.label, a.bytes, a.source) for a in allocations if a.bytes)


def _notes(job: Job, no_peaks: str | None, no_work: str | None, work: StepWork | None) -> tuple[str, ...]:
    missing = [f"no peaks in closed form: {no_peaks}; bf16prof simulate finds them"] if no_peaks else []
    missing += [
        f"{gap} has no closed form: peaks are those of the steps; bf16prof simulate runs it" for gap in [evaluation_gap(job)] if gap
    ]
    missing += [f"no work of a step in closed form: {no_work}"] if no_work else []
    tf32 = tf32_note(job, work) if work else None
    return (*missing, *([tf32] if tf32 else []), *(job.gpu.caveats() if job.gpu else ()))


def _peaks(job: Job, engine: Engine, done: Walked, steady: Sequence[Item]) -> dict[str, Any]:
    """The fields of the record that say how high each phase goes, and what is alive at the training
    peak."""
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
