"""Every storage of a dry run: when it begins, when it ends, what it is for, and what the device's
allocator holds for it.

The ledger is told of storages by the tracker and of phases by the marks, and answers like a memory
probe. Everything else - the peak by component, the timeline, the snapshot - is read from it when
the run is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from bf16prof.allocator import Action, AllocatorOutOfMemory, Block, CachingAllocator
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.records import OutOfMemory
from bf16prof.rounding import round_up
from bf16prof.vocabulary import Component, Label, Phase

TICK = 256


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage on the device: the bytes of the storage, the bytes that the allocator holds for
    it, and what it is for.

    Or `count` storages of the same size that are allocated one after the other and end together:
    `bytes` are those of all. `layer`: the module that allocated it, where one was running.
    """

    index: int
    bytes: int
    held: int
    label: Label
    stream: int
    count: int = 1
    blocks: tuple[Block, ...] = ()
    is_live: bool = True
    layer: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A phase begins (`None`: none is open) before event number `event`, in optimizer step `step`
    (-1: before the first)."""

    event: int
    phase: Phase | None
    step: int


class Instant(NamedTuple):
    """A moment of a ledger: how many events and how many marks were before."""

    events: int
    marks: int


@dataclass(frozen=True, slots=True)
class Loop:
    """So many micro-steps have been left out at `end`, each like the one from `start` on. `before`:
    where the one before that starts."""

    before: Instant
    start: Instant
    end: Instant
    left_out: int


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One action of the caching allocator, and the number of ledger allocations made before it."""

    action: Action
    address: int
    size: int
    stream: int
    allocation: int


class Ledger:
    """The memory of one device. With an allocator it is a GPU's; without, storages count as they
    are (CPU ranks)."""

    def __init__(self, allocator: CachingAllocator | None = None) -> None:
        self.allocator = allocator
        self.allocations: list[Allocation] = []
        self.events: list[int] = []
        """What happened, in order: allocation `i` begins as `i + 1` and ends as `-(i + 1)`."""
        self.marks: list[Mark] = []
        self.step_starts: list[int] = []
        """Number of events before each optimizer step."""
        self.stream = 0
        self.layer = ""
        """The module that runs (`layers.Layers`)."""
        self.stream_uses: list[tuple[int, int, int]] = []
        """Number of events before, index of the allocation and stream of every `use_on_stream`."""
        self.loops: list[Loop] = []
        self.emptied = 0
        """How often the cache was emptied because somebody asked for it."""
        self.out_of_memory: OutOfMemory | None = None
        self.before_verdict: Callable[[], None] = lambda: None
        """Called before the holders of an out-of-memory verdict are added up, to label what is not
        labelled yet."""
        self.trace: list[TraceEntry] = []
        self.peak_reserved = self.allocated_at_peak_reserved = 0
        self.on_tick: Callable[[], None] = lambda: None
        """Called every `TICK` allocations, to say how far the run has come."""
        self._allocated = self._phase_peak = 0
        self.open_peak = self.open_peak_reserved = 0
        """The highest that was allocated and reserved since `reset_open_peaks`: `torch.cuda`'s
        counters, which are a script's own."""
        self._ended: deque[Allocation] = deque()
        self._heirs: dict[int, Allocation] = {}

    def begin(self, size: int, label: Label, count: int = 1) -> Allocation:
        """A storage of `size` bytes is allocated on the current stream, or so many, one after the
        other, that will end together."""
        self._settle()
        allocation = Allocation(len(self.allocations), size * count, size * count, label, self.stream, count, layer=self.layer)
        self.allocations.append(allocation)
        if self.allocator is not None:
            allocation.blocks = tuple(self._blocks(self.allocator, allocation))
            allocation.held = sum(block.size for block in allocation.blocks)
        self.events.append(allocation.index + 1)
        self._allocated += allocation.held
        self._phase_peak = max(self._phase_peak, self._allocated)
        self.open_peak = max(self.open_peak, self._allocated)
        if self.allocator is not None:
            self.open_peak_reserved = max(self.open_peak_reserved, self.allocator.reserved_bytes)
        if allocation.index % TICK == 0:
            self.on_tick()
        return allocation

    def end(self, allocation: Allocation) -> None:
        """The storage is gone. Python may say so at any moment, even within `begin`, so it is
        entered before the next event."""
        self._ended.append(allocation)

    def succeed(self, old: Allocation, new: Allocation) -> None:
        """Whoever holds the old storage holds the new one from now on."""
        if old is not new:
            self._heirs[old.index] = new

    def held_by(self, allocation: Allocation) -> Allocation:
        """The storage that the holder of this one has now."""
        while (heir := self._heirs.get(allocation.index)) is not None:
            allocation = heir
        return allocation

    def now(self) -> Instant:
        """This moment, every storage that is gone counted."""
        self._settle()
        return Instant(len(self.events), len(self.marks))

    def touch(self, size: int, label: Label) -> None:
        """Scratch memory of a kernel, which begins and ends at once."""
        if size:
            self.end(self.begin(size, label))

    def use_on_stream(self, allocation: Allocation, stream: int) -> None:
        """`Tensor.record_stream`: another stream works with the storage."""
        allocation = self.held_by(allocation)
        if self.allocator is not None and allocation.blocks:
            self._settle()
            self.stream_uses.append((len(self.events), allocation.index, stream))
            for block in allocation.blocks:
                self.allocator.record_stream(block, stream)

    def relabel(self, claims: Iterable[tuple[Allocation, Label]]) -> None:
        """What somebody who holds storages says that they are for."""
        for allocation, label in claims:
            self.held_by(allocation).label = label

    @property
    def step(self) -> int:
        """The optimizer step that is running or was the last (from 0), -1 before the first."""
        return len(self.step_starts) - 1

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self._settle()
        self.step_starts.append(len(self.events))

    def mark(self, phase: Phase | None) -> None:
        """A phase begins."""
        self._settle()
        self.marks.append(Mark(len(self.events), phase, self.step))

    def allocated_bytes(self) -> int:
        """Bytes held for live storages now."""
        self._settle()
        return self._allocated

    def reserved_bytes(self) -> int:
        """Bytes that the caching allocator holds now; for CPU ranks, what is allocated."""
        self._settle()
        return self._allocated if self.allocator is None else self.allocator.reserved_bytes

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache`."""
        self._settle()
        self.emptied += 1
        if self.allocator is not None:
            self.allocator.empty_cache()

    def synchronize(self) -> None:
        """`torch.cuda.synchronize`."""
        self._settle()
        if self.allocator is not None:
            self.allocator.synchronize()

    def take_phase_peak(self) -> int:
        """The highest since the last call; starts again from now."""
        self._settle()
        peak, self._phase_peak = self._phase_peak, self._allocated
        return peak

    def reset_open_peaks(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`."""
        self.open_peak, self.open_peak_reserved = self.allocated_bytes(), self.reserved_bytes()

    def live(self, before: int | None = None) -> Iterator[Allocation]:
        """The storages that are alive after the first `before` events (all, if not given)."""
        alive: dict[int, None] = {}
        for event in self.events[:before]:
            if event > 0:
                alive[event - 1] = None
            else:
                del alive[-event - 1]
        return (self.allocations[index] for index in alive)

    def keep_trace(self) -> None:
        """Write down what the allocator does from now on, for a snapshot."""
        assert self.allocator is not None, "only a caching allocator has a trace"
        self.allocator.on_event = self._write_down

    def _write_down(self, action: Action, address: int, size: int, stream: int) -> None:
        self.trace.append(TraceEntry(action, address, size, stream, len(self.allocations)))

    def _settle(self) -> None:
        while self._ended:
            allocation = self.held_by(self._ended.popleft())
            if not allocation.is_live:
                continue
            allocation.is_live = False
            self.events.append(-allocation.index - 1)
            self._allocated -= allocation.held
            if self.allocator is not None:
                for block in allocation.blocks:
                    self.allocator.free(block)
                allocation.blocks = ()

    def _blocks(self, allocator: CachingAllocator, allocation: Allocation) -> Iterator[Block]:
        """The blocks of the storages, one for as many as lie side by side."""
        left, size = allocation.count, allocation.bytes // allocation.count
        while left:
            block = self._block(allocator, allocation, size, left)
            count = block.requested // size if size else left
            left -= count
            if allocator.reserved_bytes > self.peak_reserved:
                first = round_up(size, ALLOCATOR_BLOCK_BYTES) if count > 1 else block.size  # it needed the memory, not those after it
                self.peak_reserved = allocator.reserved_bytes
                self.allocated_at_peak_reserved = allocator.allocated_bytes - block.size + first
            yield block

    def _block(self, allocator: CachingAllocator, allocation: Allocation, size: int, most: int) -> Block:
        """A block. The first time that there is no room is written down; from then on the device
        has no limit."""
        try:
            return allocator.allocate(size, self.stream, most)
        except AllocatorOutOfMemory as error:
            self.before_verdict()
            begun = size * (allocation.count - most)
            of_this = replace(allocation, bytes=begun, held=error.allocated_bytes - self._allocated)
            self.out_of_memory = OutOfMemory(
                phase=(self.marks[-1].phase if self.marks else None) or Phase.INIT,
                step=self.step if self.step_starts else None,
                tensor=allocation.label[1],
                requested_bytes=error.requested_bytes,
                allocated_bytes=error.allocated_bytes,
                reserved_bytes=error.reserved_bytes,
                limit_bytes=error.limit_bytes,
                holders=by_component([*self.live(), of_this]),
            )
            allocator.lift_limit()
            return allocator.allocate(size, self.stream, most)


def by_component(allocations: Iterable[Allocation]) -> dict[Component, int]:
    """Bytes by component, biggest first; what the allocator adds to the storages is rounding."""
    sizes: dict[Component, int] = {}
    for allocation in allocations:
        component = allocation.label[0]
        sizes[component] = sizes.get(component, 0) + allocation.bytes
        sizes[Component.ROUNDING] = sizes.get(Component.ROUNDING, 0) + allocation.held - allocation.bytes
    return dict(sorted(((c, size) for c, size in sizes.items() if size), key=lambda pair: -pair[1]))
