"""From a ledger to a record: the same whether our own loop or somebody's script ran in the dry
run's world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.dry_run.history import items_at, layers_at, timeline, training_peak
from bf16prof.dry_run.ledger import Ledger
from bf16prof.dry_run.repeat import last_step, repeat
from bf16prof.dry_run.tracker import Tracker
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.engine.phases import PhaseMarks
from bf16prof.engine.workspace import CUBLAS_SOURCE
from bf16prof.profiles.beside import beside_the_allocator
from bf16prof.profiles.gpus import Gpu
from bf16prof.records import Case, Item, MemoryRecord, Workload, by_component, merge_phases, peak_phase, with_other
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Component, Device, Phase, Source

MOST_REPEATS = 12
"""A training job that this project measures takes 3 + 10 steps."""


@dataclass(frozen=True)
class Ran:
    """What a ledger does not tell: what was run on which GPU, and what it holds when the last step
    is over.

    `allocated_bytes` and `items` are those between steps; `step` is the one (from 0) whose timeline
    is shown.
    """

    case: Case
    gpu: Gpu | None
    workload: Workload
    parameters: int
    items: Sequence[Item]
    allocated_bytes: int
    phases: dict[Phase, PhaseMemory]
    step: int


def until_settled(
    ledger: Ledger, marks: PhaseMarks, phases: dict[Phase, PhaseMemory], *, goes_on: bool = False
) -> dict[Phase, PhaseMemory]:
    """The phases over as many further steps like the last one as it takes the caching allocator to
    settle.

    `goes_on`: more is run after that, so that tensors have to hold what the last of these steps has
    left.
    """
    before = None
    for _ in range(MOST_REPEATS if ledger.allocator else 0):
        if (step := last_step(ledger)) is None:
            break
        ledger.begin_step()
        for mark in repeat(ledger, step, succeeding=goes_on):
            marks.mark(mark.phase)
        now = marks.take(), ledger.peak_reserved
        phases = merge_phases(phases, now[0])
        if now == before:
            break
        before = now
    return phases


def record_of(ran: Ran, tracker: Tracker) -> MemoryRecord:
    """The record."""
    ledger = tracker.ledger
    explained, doubt = with_other(ran.items, ran.allocated_bytes)
    peak = training_peak(ledger)
    peak_items = items_at(ledger, peak)
    highest = peak_phase(ran.phases)
    assert highest is not None, "every phase has run"
    allocator = ledger.allocator
    beside = beside_the_allocator(ran.case.world_size, ran.gpu.compute_capability) if allocator and ran.gpu else ()
    return MemoryRecord(
        source=Source.SIMULATE,
        case=ran.case,
        device=Device.CPU if allocator is None else Device.GPU,
        gpu=ran.gpu.id if ran.gpu else None,
        workload=ran.workload,
        parameters=ran.parameters,
        allocated_bytes=ran.allocated_bytes,
        components=by_component(explained),
        items=explained,
        peak_allocated_bytes=ran.phases[highest].peak_bytes,
        peak_phase=highest,
        peak_components=by_component(peak_items),
        peak_items=peak_items,
        peak_layers=layers_at(ledger, peak),
        run_peak_allocated_bytes=max(memory.peak_bytes or 0 for memory in ran.phases.values()),
        phases=dict(ran.phases),
        reserved_bytes=ledger.peak_reserved if allocator else None,
        fragmentation_bytes=ledger.peak_reserved - ledger.allocated_at_peak_reserved if allocator else None,
        device_bytes=ledger.peak_reserved + sum(item.bytes for item in beside) if allocator else None,
        device_items=beside,
        out_of_memory=ledger.out_of_memory,
        host_bytes=tracker.host_bytes if allocator else None,
        allocator_retries=allocator.retries if allocator else None,
        timeline=timeline(ledger, ran.step),
        notes=(doubt,) if doubt else (),
    )


def of_the_device(ledger: Ledger) -> list[Item]:
    """What the GPU adds to the tensors that are held, besides rounding."""
    allocator = ledger.allocator
    if allocator is None:
        return []
    workspace = sum(a.bytes for a in ledger.live() if a.label == CUBLAS_WORKSPACES)
    source = "c10/cuda/CUDACachingAllocator.cpp should_split"
    items = [
        Item(*CUBLAS_WORKSPACES, workspace, CUBLAS_SOURCE),
        Item(Component.ROUNDING, "remainders of blocks too small to be split off", allocator.tail_bytes, source),
    ]
    return [item for item in items if item.bytes]
