"""Whether a job has room on its GPU, and what predictions had said: one wording for console, HTML, Markdown and CSV."""

from __future__ import annotations

from dataclasses import dataclass

from bf16prof.profiles import beside
from bf16prof.profiles.gpus import gpu_named
from bf16prof.records import Device, Item, MemoryRecord, OutOfMemory, Phase, Source
from bf16prof.reports.units import gib, inert, part_of
from bf16prof.reports.views import CaseView, component_name

_HOLDERS = 4
_ORDINALS = ("first", "second", "third")


@dataclass(frozen=True)
class Verdict:
    """Whether a record fits its GPU: in two words or so, and with the numbers that decide."""

    fits: bool
    short: str
    text: str


def verdict(record: MemoryRecord) -> Verdict | None:
    """The verdict of a prediction for a GPU: of a dry run, which knows the allocator, or of an estimate, which knows what it has to hold at
    least. `None` where a record knows neither; a measurement has no need of one.
    """
    shortage = record.out_of_memory
    if shortage is not None:
        return Verdict(False, f"out of memory in {shortage.phase}", _shortage(record, shortage))
    if record.source is Source.ESTIMATE:
        return _estimated(record)
    if record.source is not Source.SIMULATE or record.device is not Device.GPU or record.reserved_bytes is None:
        return None
    return Verdict(True, "fits", _room(record))


def case_verdict(view: CaseView) -> Verdict | None:
    """The verdict of a case: of its dry run; of its estimate only where there is nothing better."""
    found = {source: said for source, record in view.records.items() if (said := verdict(record))}
    estimated = None if view.reference else found.get(Source.ESTIMATE)
    return next((said for source, said in found.items() if source is not Source.ESTIMATE), estimated)


def prediction_text(record: MemoryRecord) -> str:
    """What a prediction had said, to stand beside a failure: "estimate: 14.60 GiB allocated, training peak 19.17 GiB"."""
    peak = "unknown" if record.peak_allocated_bytes is None else gib(record.peak_allocated_bytes)
    said = verdict(record)
    return f"{record.source}: {gib(record.allocated_bytes)} allocated, training peak {peak}" + (f", {said.short}" if said else "")


def beside_the_allocator(record: MemoryRecord) -> str:
    """What the device holds besides the reserved bytes, each with what was assumed; empty where nothing is known of it."""
    parts = [f"{inert(item.name)} {gib(item.bytes)}" + (f" ({inert(item.source)})" if item.source else "") for item in record.device_items]
    return f"on the device besides the allocator: {', '.join(parts)}" if parts else ""


def device_total(record: MemoryRecord) -> int | None:
    """The memory of the record's GPU; `None` for a GPU that the table does not know."""
    gpu = gpu_named(record.gpu)
    return gpu.memory_bytes if gpu else None


def allocator_limit(record: MemoryRecord) -> int | None:
    """The most that the caching allocator may reserve: the device's memory without what the process holds besides."""
    if record.out_of_memory is not None:
        return record.out_of_memory.limit_bytes
    total, held = device_total(record), _held_besides(record)
    return None if total is None or not held else total - sum(item.bytes for item in held)


def _held_besides(record: MemoryRecord) -> tuple[Item, ...]:
    """What the record says of it; of an estimate, which says nothing, the same as a dry run assumes."""
    if record.source is not Source.ESTIMATE:
        return record.device_items
    gpu = gpu_named(record.gpu)
    return beside.beside_the_allocator(record.case.world_size, gpu.compute_capability if gpu else None)


def _gpu(record: MemoryRecord) -> str:
    return f" {inert(record.gpu)}" if record.gpu else ""


def _estimated(record: MemoryRecord) -> Verdict | None:
    """Whether the most that a job holds, as far as it is known, stays within what the allocator may reserve."""
    peak = record.peak_allocated_bytes if record.run_peak_allocated_bytes is None else record.run_peak_allocated_bytes
    most, limit = record.allocated_bytes if peak is None else peak, allocator_limit(record)
    if most is None or limit is None:
        return None
    free, when = limit - most, "between steps" if peak is None else "at most"
    without = " and ".join(f"{item.name} {gib(item.bytes)}" for item in _held_besides(record))
    text = f"{_gpu(record)}: {part_of(most, limit)} allocated {when}; {without} taken off, fragmentation not"
    if free < 0:
        return Verdict(False, f"{gib(-free)} over", f"too large for{text}")
    return Verdict(True, f"{gib(free)} free", f"has room on{text}")


def _room(record: MemoryRecord) -> str:
    highest = record.peak_allocated_bytes if record.run_peak_allocated_bytes is None else record.run_peak_allocated_bytes
    parts = [f"{gib(highest)} at most allocated", f"{gib(record.reserved_bytes)} reserved"]
    if record.device_bytes is not None:
        parts.append(f"{part_of(record.device_bytes, device_total(record))} on the device")
    retries = record.allocator_retries
    freed = f"; {retries:,} allocations find room only after the cache is freed" if retries else ""
    return f"fits{_gpu(record)}: {', '.join(parts)}{freed}"


def _shortage(record: MemoryRecord, shortage: OutOfMemory) -> str:
    gpu = f" on{_gpu(record)}" if record.gpu else ""
    holders = sorted(((size, c) for c, size in shortage.holders.items() if size * 100 >= shortage.allocated_bytes), key=lambda h: -h[0])
    biggest = ", ".join(f"{component_name(component)} {gib(size)}" for size, component in holders[:_HOLDERS])
    fragmented = shortage.allocated_bytes + shortage.requested_bytes <= shortage.limit_bytes
    return (
        f"runs out of memory{gpu} in {_instant(shortage)}, allocating {gib(shortage.requested_bytes)} for `{inert(shortage.tensor)}`: "
        f"{gib(shortage.allocated_bytes)} allocated, {part_of(shortage.reserved_bytes, shortage.limit_bytes)} reserved"
        + ("; without fragmentation there would be room" if fragmented else "")
        + (f"; biggest holders: {biggest}" if biggest else "")
        + "; all other numbers are as if there were room"
    )


def _instant(shortage: OutOfMemory) -> str:
    step = shortage.step
    if shortage.phase is Phase.INIT or step is None:
        return str(shortage.phase)
    which = f"the {_ORDINALS[step]} step" if step < len(_ORDINALS) else f"step {step} (counted from 0)"
    return f"the {shortage.phase} phase of {which}"
