"""Whether a job fits its GPU: the one function that judges for estimate, simulate, plan and
measure.

What is compared: the most that the job allocates in the whole run, init included; what its caching
allocator reserves for that; and the limit, which is the GPU's memory less what the process holds
beside the allocator (`profiles/beside.py`).

* **fits**: what the allocator reserves stays within the limit, less the margin where the allocator
  was replayed and not run.
* **tight**: the bytes fit, but the allocator's share may not.
* **does not fit**: the bytes alone are more than the limit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

from bf16prof.profiles import beside
from bf16prof.profiles.gpus import Gpu, gpu_named
from bf16prof.records import Item, MemoryRecord, OutOfMemory
from bf16prof.vocabulary import Device, Phase, Source, Verdict

MARGIN, MARGIN_EXPANDABLE = 0.1, 0.05
"""What the replay of the allocator does not know, as a share of the limit: with default and with
expandable segments. The replay was held against dry runs (docs/plan.md): it orders events as the
engine does, but not each small tensor is in it, and where a large block finds a hole may turn on
one of those."""

UNDECIDED_FROM = 0.5
"""A peak below this share of the room fits without a replay: of all jobs that were drawn, none
reserved twice what it allocated."""


class Replays(Enum):
    """Which jobs of an estimate have their allocator replayed: none, those whose verdict turns on
    it, or all whose bytes fit."""

    NONE = "none"
    DECISIVE = "decisive"
    ALL = "all"


@dataclass(frozen=True)
class Allocator:
    """How a job's caching allocator is set, and the share of its limit that has to stay free
    (`MARGIN` if not given)."""

    expandable: bool = False
    margin: float | None = None

    @property
    def share_to_keep(self) -> float:
        """The margin in force."""
        usual = MARGIN_EXPANDABLE if self.expandable else MARGIN
        return usual if self.margin is None else self.margin


@dataclass(frozen=True)
class Judgement:
    """A verdict with the numbers that decide.

    * `peak_bytes`: the most that is allocated in the whole run, in `phase` where that is known.
    * `reserved_bytes`: the most that the allocator reserves; `None` where that was not needed to
      judge.
    * `limit_bytes`: what it may reserve; `room_bytes`: the same less the margin. `None` of a GPU
      whose size is not known.
    """

    verdict: Verdict
    peak_bytes: int
    phase: Phase | None
    reserved_bytes: int | None
    limit_bytes: int | None
    margin: float = 0.0

    @property
    def room_bytes(self) -> int | None:
        """What may be reserved with the margin kept."""
        return None if self.limit_bytes is None else room_bytes(self.limit_bytes, self.margin)

    @property
    def free_bytes(self) -> int | None:
        """What is left of the limit, of the room where it is tight; negative: what lacks."""
        if self.limit_bytes is None:
            return None
        if self.verdict is Verdict.DOES_NOT_FIT:
            return self.limit_bytes - self.peak_bytes
        assert self.room_bytes is not None
        return self.room_bytes - (self.peak_bytes if self.reserved_bytes is None else self.reserved_bytes)


def judge(record: MemoryRecord) -> Judgement | None:
    """The verdict of a record; `None` where its source cannot tell, and of CPU ranks."""
    limit, peak = allocator_limit(record), most_allocated(record)
    if record.device is not Device.GPU or peak is None:
        return None
    shortage = record.out_of_memory
    if shortage is not None:
        peak = max(peak, shortage.allocated_bytes)
    found = _verdict(record, peak, limit)
    if found is None:
        return None
    phases = [phase for phase, memory in record.phases.items() if memory.peak_bytes == peak]
    phase = phases[0] if phases else shortage.phase if shortage else record.peak_phase
    return Judgement(found, peak, phase, record.reserved_bytes, limit, record.margin or 0.0)


def of_a_run(record: MemoryRecord, gpu: Gpu | None, *, finished: bool, out_of_memory: bool) -> MemoryRecord:
    """The record of a measurement with its verdict: what has finished fits, what ran out of memory
    does not; nothing follows otherwise.

    The limit is the GPU's memory less what the device held beside the allocator, where that was
    measured.
    """
    if gpu is None:
        return record
    limit = gpu_limit(gpu, record.case.world_size)
    if record.device_bytes is not None and record.reserved_bytes is not None:
        limit = max(0, gpu.memory_bytes - max(0, record.device_bytes - record.reserved_bytes))
    found = Verdict.FITS if finished else Verdict.DOES_NOT_FIT if out_of_memory else None
    return dataclasses.replace(record, verdict=found, limit_bytes=limit)


def judged(record: MemoryRecord) -> MemoryRecord:
    """The record with its verdict."""
    found = judge(record)
    return dataclasses.replace(record, verdict=found.verdict if found else None)


def _verdict(record: MemoryRecord, peak: int, limit: int | None) -> Verdict | None:
    if record.source is Source.MEASURE:
        return record.verdict  # what happened (`of_a_run`)
    if limit is not None and peak > limit:
        return Verdict.DOES_NOT_FIT
    if record.out_of_memory is not None:
        return _of_a_shortage(record, record.out_of_memory)
    if record.source is Source.ESTIMATE and "run_peak_allocated_bytes" in record.at_least:
        return None  # something that is not predicted may hold more
    is_peak_known = record.run_peak_allocated_bytes is not None or record.peak_allocated_bytes is not None
    if not is_peak_known or record.source is Source.IMPORT:
        return None  # what is allocated between steps says nothing of the peak, nor does a log of how the run ended
    return _of_the_allocator(record, peak, limit)


def _of_a_shortage(record: MemoryRecord, shortage: OutOfMemory) -> Verdict:
    """Predictions know the whole run as if there were room; of what really ran out of memory only
    the request is known."""
    needed = shortage.allocated_bytes + shortage.requested_bytes
    is_predicted = record.source in (Source.ESTIMATE, Source.SIMULATE)
    return Verdict.DOES_NOT_FIT if not is_predicted and needed > shortage.limit_bytes else Verdict.TIGHT


def _of_the_allocator(record: MemoryRecord, peak: int, limit: int | None) -> Verdict | None:
    room, reserved = None if limit is None else room_bytes(limit, record.margin or 0.0), record.reserved_bytes
    if record.source is Source.ESTIMATE and room is None:
        return None
    if reserved is not None:
        return Verdict.FITS if room is None or reserved <= room else Verdict.TIGHT
    if record.source is not Source.ESTIMATE or room is None:
        return None
    return Verdict.FITS if is_surely_within(peak, room) else Verdict.TIGHT


def is_surely_within(peak_bytes: int, room: int) -> bool:
    """Whether a peak fits whatever the allocator makes of it."""
    return peak_bytes <= room * UNDECIDED_FROM


def room_bytes(limit_bytes: int, margin: float) -> int:
    """The limit less the margin."""
    return int(limit_bytes * (1 - margin))


def most_allocated(record: MemoryRecord) -> int | None:
    """The most that the record says is allocated at any time."""
    known = (record.run_peak_allocated_bytes, record.peak_allocated_bytes, record.allocated_bytes)
    return next((size for size in known if size is not None), None)


def allocator_limit(record: MemoryRecord) -> int | None:
    """The most that the caching allocator may reserve: the device's memory without what the process
    holds besides.

    `None` where the GPU is not known, or what the process holds besides.
    """
    if record.limit_bytes is not None:
        return record.limit_bytes
    if record.out_of_memory is not None:
        return record.out_of_memory.limit_bytes
    total, held = device_total(record), held_besides(record)
    return None if total is None or not held else max(0, total - sum(item.bytes for item in held))


def gpu_limit(gpu: Gpu, world_size: int) -> int:
    """The same of a GPU on which a job of so many ranks runs."""
    return max(0, gpu.memory_bytes - sum(item.bytes for item in beside.beside_the_allocator(world_size, gpu.compute_capability)))


def device_total(record: MemoryRecord) -> int | None:
    """The memory of the record's GPU; `None` for a GPU that the table does not know."""
    gpu = gpu_named(record.gpu)
    return gpu.memory_bytes if gpu else None


def held_besides(record: MemoryRecord) -> tuple[Item, ...]:
    """What the process holds beside the allocator as the record says; of an estimate, which says
    nothing, what a dry run assumes."""
    if record.source is not Source.ESTIMATE:
        return record.device_items
    gpu = gpu_named(record.gpu)
    return beside.beside_the_allocator(record.case.world_size, gpu.compute_capability if gpu else None)
