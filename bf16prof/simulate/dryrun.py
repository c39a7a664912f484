"""One job through the real engine in a dry run: its record, with the peak and the end of every phase."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping

import torch

from bf16prof.cases import Job
from bf16prof.engine.attribution import attribute
from bf16prof.engine.phases import PhaseMarks, attach
from bf16prof.engine.training import Batch, TrainingLoop, build_engine
from bf16prof.engine.workspace import CUBLAS_NAME, CUBLAS_SOURCE, CUBLAS_THREADS, cublas_workspace_bytes
from bf16prof.records import Component, Device, Item, MemoryRecord, Phase, PhaseMemory, Source
from bf16prof.simulate.tracker import Tracker
from bf16prof.simulate.world import torch_device, world

STEPS = 3
"""The first step creates the moments, ZeRO-3 records its trace in it and prefetches from the second on; the third repeats the second."""

TRAINING = (Phase.FORWARD, Phase.BACKWARD, Phase.STEP)


def dry_run(job: Job, on_step: Callable[[int], None] = lambda _: None) -> MemoryRecord:
    """Run the job as one rank of its world (one dry run per process) and record it.

    `on_step` is told when step 0, 1, ... is over (-1: init).
    """
    warnings.simplefilter("ignore")  # PyTorch's and DeepSpeed's own, about private interfaces and CPUs
    with world(job.case.world_size, job.device, job.gpu) as tracker:
        marks = PhaseMarks(tracker)
        marks.mark(Phase.INIT)
        engine = build_engine(job)
        gc.collect()
        marks.mark(None)
        phases = marks.take()
        on_step(-1)
        attach(engine, marks)
        loop = TrainingLoop(engine, job, _batches(job))
        for step in range(STEPS):
            loop.step()
            phases = _merge(phases, marks.take())
            on_step(step)
        items, _ = attribute(engine, loop.kept, torch_device(job.device))
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        return _record(job, tracker, parameters, phases, items)


def _batches(job: Job) -> Callable[[], Batch]:
    """Batches without values, of the job's shape, on its device."""
    workload = job.profile.workload
    shape = (workload.micro_batch_size, workload.sequence_length)
    place = torch_device(job.device)
    return lambda: (torch.empty(shape, dtype=torch.int64, device=place), torch.empty(shape, dtype=torch.int64, device=place))


def _merge(before: Mapping[Phase, PhaseMemory], now: Mapping[Phase, PhaseMemory]) -> dict[Phase, PhaseMemory]:
    """The highest peak and the last end of each phase."""
    merged = dict(before)
    for phase, memory in now.items():
        known = before.get(phase, PhaseMemory())
        merged[phase] = PhaseMemory(max(known.peak_bytes or 0, memory.peak_bytes or 0), memory.end_bytes)
    return merged


def _record(job: Job, tracker: Tracker, parameters: int, phases: Mapping[Phase, PhaseMemory], items: list[Item]) -> MemoryRecord:
    workspace = 0
    if job.device is Device.GPU:
        assert job.gpu is not None, "a dry run for a GPU needs one"
        workspace = CUBLAS_THREADS * cublas_workspace_bytes(job.gpu)
        items = [*items, Item(Component.WORKSPACE, CUBLAS_NAME, workspace, CUBLAS_SOURCE)]
    allocated = tracker.allocated_bytes() + workspace
    if other := allocated - sum(item.bytes for item in items):
        items = [*items, Item(Component.OTHER, "not held by the engine", other, "allocated less everything attributed")]
    phases = {phase: _with_workspace(memory, workspace if phase in TRAINING else 0) for phase, memory in phases.items()}
    peak_phase = max(TRAINING, key=lambda phase: phases[phase].peak_bytes or 0)
    return MemoryRecord(
        source=Source.SIMULATE,
        case=job.case,
        device=job.device,
        gpu=job.gpu.id if job.gpu else None,
        parameters=parameters,
        allocated_bytes=allocated,
        components={c: sum(i.bytes for i in items if i.component is c) for c in Component},
        items=tuple(items),
        peak_allocated_bytes=phases[peak_phase].peak_bytes,
        peak_phase=peak_phase,
        run_peak_allocated_bytes=max(memory.peak_bytes or 0 for memory in phases.values()),
        phases=phases,
        host_bytes=tracker.host.current if job.device is Device.GPU else None,
    )


def _with_workspace(memory: PhaseMemory, workspace: int) -> PhaseMemory:
    return PhaseMemory((memory.peak_bytes or 0) + workspace, (memory.end_bytes or 0) + workspace)
