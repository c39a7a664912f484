"""One job through the real engine in a dry run: its record, with the peak and the end of every phase."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping

import torch

from bf16prof.cases import Job
from bf16prof.engine.attribution import attribute
from bf16prof.engine.phases import PhaseMarks, attach
from bf16prof.engine.training import Batch, TrainingLoop, build_engine, parameter_count
from bf16prof.engine.workspace import CUBLAS_NAME, CUBLAS_SOURCE, CUBLAS_THREADS, cublas_workspace_bytes
from bf16prof.records import (
    TRAINING,
    Component,
    Device,
    Item,
    MemoryRecord,
    Phase,
    PhaseMemory,
    Source,
    by_component,
    merge_phases,
    peak_phase,
    with_other,
)
from bf16prof.simulate.tracker import Tracker
from bf16prof.simulate.world import torch_device, world

STEPS = 2
"""The first step creates the moments, ZeRO-3 records its trace in it and prefetches from the second on; the third repeats the second."""


def dry_run(job: Job) -> MemoryRecord:
    """Run the job as one rank of its world (one dry run per process) and record it."""
    warnings.simplefilter("ignore")  # PyTorch's and DeepSpeed's own, about private interfaces and CPUs
    with world(job.case.world_size, job.device, job.gpu) as tracker:
        marks = PhaseMarks(tracker)
        marks.mark(Phase.INIT)
        engine = build_engine(job)
        gc.collect()
        marks.mark(None)
        phases = marks.take()
        attach(engine, marks)
        loop = TrainingLoop(engine, job, _batches(job))
        for _ in range(STEPS):
            loop.step()
            phases = merge_phases(phases, marks.take())
        items, _ = attribute(engine, loop.kept, torch_device(job.device))
        return _record(job, tracker, parameter_count(engine), phases, items)


def _batches(job: Job) -> Callable[[], Batch]:
    """Batches without values, of the job's shape, on its device."""
    workload = job.profile.workload
    shape = (workload.micro_batch_size, workload.sequence_length)
    place = torch_device(job.device)
    return lambda: (torch.empty(shape, dtype=torch.int64, device=place), torch.empty(shape, dtype=torch.int64, device=place))


def _record(job: Job, tracker: Tracker, parameters: int, phases: Mapping[Phase, PhaseMemory], items: list[Item]) -> MemoryRecord:
    workspace = 0
    if job.device is Device.GPU:
        assert job.gpu is not None, "a dry run for a GPU needs one"
        workspace = CUBLAS_THREADS * cublas_workspace_bytes(job.gpu)
        items = [*items, Item(Component.WORKSPACE, CUBLAS_NAME, workspace, CUBLAS_SOURCE)]
    allocated = tracker.allocated_bytes() + workspace
    explained = with_other(items, allocated)
    phases = {phase: _with_workspace(memory, workspace if phase in TRAINING else 0) for phase, memory in phases.items()}
    highest = peak_phase(phases)
    assert highest is not None, "every phase has run"
    return MemoryRecord(
        source=Source.SIMULATE,
        case=job.case,
        device=job.device,
        gpu=job.gpu.id if job.gpu else None,
        parameters=parameters,
        allocated_bytes=allocated,
        components=by_component(explained),
        items=explained,
        peak_allocated_bytes=phases[highest].peak_bytes,
        peak_phase=highest,
        run_peak_allocated_bytes=max(memory.peak_bytes or 0 for memory in phases.values()),
        phases=phases,
        host_bytes=tracker.host.current if job.device is Device.GPU else None,
    )


def _with_workspace(memory: PhaseMemory, workspace: int) -> PhaseMemory:
    return PhaseMemory((memory.peak_bytes or 0) + workspace, (memory.end_bytes or 0) + workspace)
