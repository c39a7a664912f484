"""PyTorch's CUDA caching allocator without a GPU: what a dry run's tensors would cost the card that
they are simulated on.

A training step does not take from a GPU the bytes that its tensors have. Blocks are rounded up, cut
out of segments, cached per stream and never moved, so what the process reserves, and when it runs
out, depends on the order of allocations and frees. This module replays that order, online, by the
rules of c10/cuda/CUDACachingAllocator.cpp (class DeviceCachingAllocator; each docstring names the
function that its facts are from) with the default settings: no `max_split_size_mb`,
`garbage_collection_threshold`, `roundup_power2_divisions` or `large_segment_size_mb`, no private
pools, no graph capture. `expandable_segments` is the one option that can be chosen, once and for
all.

What a GPU would decide at run time is assumed:

* Work that was queued on a stream is done by the next call of `allocate`: a block that another
  stream used comes back then, since `malloc` begins with a look at the events (`process_events`).
  On a GPU that lags behind its host it comes back later.
* A new segment lies above all earlier ones. The driver is free to choose; only ties between equally
  large free blocks depend on it.
* The driver refuses memory that would take the segments past the limit, and no sooner.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Literal

from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.rounding import round_up

SMALL_BYTES = 1 << 20
"""`kSmallSize`: the largest block of the small pool (`get_pool`), and the largest remainder that is
not split off a large block."""

SMALL_SEGMENT_BYTES = 2 << 20
"""`kSmallBuffer`: a segment of the small pool (`get_allocation_size`)."""

LARGE_SEGMENT_BYTES = 20 << 20
"""`kLargeBuffer`, in later versions the default of `large_segment_size_mb`: the segment of large
blocks under `OWN_SEGMENT_BYTES`."""

OWN_SEGMENT_BYTES = 10 << 20
"""`kMinLargeAlloc`: from this size on, a large block that finds no free one gets a segment of its
own size (`get_allocation_size`)."""

SEGMENT_STEP_BYTES = 2 << 20
"""`kRoundLarge`: what the size of such a segment is a multiple of."""

FIRST_ADDRESS, UNLIMITED_ADDRESS_BYTES = 0x7F00_0000_0000, 1 << 44
"""Where the made-up address space begins, and what an expandable segment takes of it on a device
without limit."""

Action = Literal["alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom"]
"""What `torch.cuda.memory._snapshot()["device_traces"]` can say of an event."""

OnEvent = Callable[[Action, int, int, int], None]
"""Takes an event's action, address, size and stream."""

State = Literal["active_allocated", "active_pending_free", "inactive", "unmapped"]
"""What `torch.cuda.memory._snapshot()["segments"]` can say of a block, where nothing unmapped
occurs.

A pending block is freed, but another stream may still use it. An unmapped one is address space of
an expandable segment without memory.
"""


@dataclass(eq=False)
class AllocatorOutOfMemory(Exception):
    """The GPU has no room for a request, even without what the allocator had cached
    (`OutOfMemoryError` in `malloc`)."""

    requested_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    limit_bytes: int

    def __str__(self) -> str:
        return f"no room for {self.requested_bytes} bytes: of {self.limit_bytes}, {self.reserved_bytes} are reserved already"


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment (`struct Block`). Who allocated it keeps it to free it, once, and then
    forgets it.

    `size` is what counts as allocated, the `tail` included that was not split off; `requested` is
    what was asked for. `stream_uses` are the streams other than its own that work on it. `prev` and
    `next` are its neighbours in the segment; the first block of a segment stays the same object.
    """

    address: int
    size: int
    pool: Pool = field(repr=False)
    state: State
    requested: int = 0
    tail: int = 0
    stream_uses: set[int] | None = None
    prev: Block | None = field(default=None, repr=False)
    next: Block | None = field(default=None, repr=False)

    @property
    def stream(self) -> int:
        """The stream that the block was allocated on."""
        return self.pool.stream

    def onwards(self) -> Iterator[Block]:
        """The blocks of the segment from this one on."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.next

    def split(self, size: int, state: State) -> Block:
        """Cut off what is beyond `size` bytes as a block of that state."""
        after = self.next
        right = Block(self.address + size, self.size - size, self.pool, state, 0, 0, None, self, after)
        if after is not None:
            after.prev = right
        self.next, self.size = right, size
        return right

    def absorb(self, right: Block) -> None:
        """Undo the split from the next block."""
        self.next, self.size = right.next, self.size + right.size
        if right.next is not None:
            right.next.prev = self


@dataclass(slots=True, eq=False)
class Pool:
    """One stream's share of PyTorch's small or large pool (`struct BlockPool`).

    `free` is ordered by size, then address (`BlockComparatorSize`). `unmapped` is the address space
    of expandable segments that no memory backs, ordered by address (`BlockComparatorAddress`); they
    grow by `page_bytes` (`find_expandable_block`). `least_remainder` is the smallest remainder that
    is split off a block: more than 1 MiB of a large one, unless expandable (`should_split`).
    """

    stream: int
    is_small: bool
    is_expandable: bool
    page_bytes: int = SMALL_SEGMENT_BYTES
    least_remainder: int = ALLOCATOR_BLOCK_BYTES
    free: list[tuple[int, int, Block]] = field(default_factory=list)
    unmapped: list[tuple[int, Block]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.is_small:
            self.page_bytes = LARGE_SEGMENT_BYTES
            self.least_remainder += 0 if self.is_expandable else SMALL_BYTES

    def put(self, block: Block) -> Block:
        """Enter an inactive or unmapped block, merged with its neighbours of the same state
        (`try_merge_blocks`)."""
        right, left = block.next, block.prev
        if right is not None and right.state == block.state:
            self.drop(right)
            block.absorb(right)
        if left is not None and left.state == block.state:
            self.drop(left)
            left.absorb(block)
            block = left
        if block.state == "inactive":
            insort(self.free, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))
        return block

    def drop(self, block: Block) -> None:
        """Take out a block that was put in."""
        if block.state == "inactive":
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    def take(self, size: int) -> Block | None:
        """Take out the smallest free block of at least that size, of several the lowest
        (`get_free_block`).

        In expandable segments a larger block goes first if it is smaller with the unmapped space
        behind it counted in.
        """
        free, index = self.free, bisect_left(self.free, (size,))
        if index == len(free):
            return None
        if self.is_expandable:
            while index + 1 < len(free) and _expandable_size(free[index + 1][2]) < _expandable_size(free[index][2]):
                index += 1
        return free.pop(index)[2]


@dataclass(frozen=True)
class BlockInfo:
    """A block in a snapshot; `requested` is 0 for an inactive one."""

    address: int
    size: int
    requested: int
    state: State


@dataclass(frozen=True)
class Segment:
    """A segment in a snapshot; of an expandable one, a stretch that is backed by memory. `blocks`
    tile it, in order of address."""

    address: int
    size: int
    stream: int
    pool: Literal["small", "large"]
    is_expandable: bool
    blocks: tuple[BlockInfo, ...]


class CachingAllocator:
    """One GPU's caching allocator, whose segments take `memory_bytes` at most (None: as much as
    they like).

    The counters are those of `torch.cuda`: `allocated_bytes` is `memory_allocated`,
    `reserved_bytes` is `memory_reserved`, `retries` is `num_alloc_retries`. `tail_bytes` is the
    part of `allocated_bytes` that is there only because remainders were too small to split off.

    `on_event` hears of every event in the words of a memory snapshot's trace and with its sizes
    (`record_trace`): of a block what was requested, of a segment its bytes. An "oom" has the free
    bytes of the device in place of an address, and the rounded size.
    """

    def __init__(self, memory_bytes: int | None = None, *, expandable_segments: bool = False, on_event: OnEvent | None = None) -> None:
        self.limit_bytes = memory_bytes
        self.is_expandable = expandable_segments
        self.on_event = on_event
        self.allocated_bytes = self.reserved_bytes = self.tail_bytes = 0
        self.retries = 0
        self._pools: dict[tuple[bool, int], Pool] = {}
        self._first_blocks: dict[int, Block] = {}
        self._pending: list[Block] = []
        self._next_address = FIRST_ADDRESS

    def lift_limit(self) -> None:
        """Go on as if on a device without limit, e.g. after the first `OutOfMemory`."""
        self.limit_bytes = None

    def allocate(self, size: int, stream: int = 0, most: int = 1) -> Block:
        """A block of at least that size for work on that stream (`malloc`, `alloc_found_block`), or
        `OutOfMemory`.

        `most`: the same again up to so many times in a row, as long as that is cut out of the same
        free block, which is what happens: what the first one leaves is then the best fit. All of
        them are one block here, of `requested` bytes together.

        No bytes cost nothing and change nothing: `NativeCachingAllocator::allocate` does not come
        as far as `malloc` then.
        """
        if size <= 0:
            return self._nothing(size, stream)
        if self._pending:
            self.synchronize()
        rounded = -(-size // ALLOCATOR_BLOCK_BYTES) * ALLOCATOR_BLOCK_BYTES  # what runs a million times in a search calls little
        pool = self._pools.get((rounded <= SMALL_BYTES, stream)) or self._pool(rounded <= SMALL_BYTES, stream)
        block = pool.take(rounded) or self._grow(pool, rounded, size)
        if most > 1:
            count = min(most, block.size // rounded)
            rounded, size = rounded * count, size * count
        tail = block.size - rounded
        if tail >= pool.least_remainder:
            rest = block.split(rounded, "inactive")  # what is behind the block is not free, or it would be one with it: nothing to merge
            insort(pool.free, (tail, rest.address, rest))
            tail = 0
        block.state, block.requested, block.tail = "active_allocated", size, tail
        self.tail_bytes += tail
        self.allocated_bytes += block.size
        if self.on_event is not None:
            self.on_event("alloc", block.address, block.requested, stream)
        return block

    def _nothing(self, size: int, stream: int) -> Block:
        if size < 0:
            raise ValueError(f"{size} bytes cannot be allocated")
        return Block(0, 0, self._pool(True, stream), "active_allocated")

    def free(self, block: Block) -> None:
        """Give a block back (`free`). It stops to count as allocated at once, even where another
        stream still uses it."""
        if block.state != "active_allocated":
            raise ValueError(f"{block} is not allocated")
        if not block.size:
            return
        self.allocated_bytes -= block.size
        self.tail_bytes -= block.tail
        if self.on_event is not None:
            self.on_event("free_requested", block.address, block.requested, block.stream)
        if block.stream_uses:
            block.state, block.stream_uses = "active_pending_free", None
            self._pending.append(block)
        else:
            self._free_block(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Say that work on another stream uses the block; its own stream does not matter
        (`recordStream`)."""
        if block.state != "active_allocated":
            raise ValueError(f"{block} is not allocated")
        if block.size and stream != block.stream:
            block.stream_uses = (block.stream_uses or set()) | {stream}

    def synchronize(self) -> None:
        """Free the blocks that other streams still held, as PyTorch does at its next `malloc`
        (`process_events`) or `emptyCache`."""
        pending, self._pending = self._pending, []
        for block in pending:
            self._free_block(block)

    def empty_cache(self) -> None:
        """Give back every segment that is one free block, and every free page of an expandable one
        (`release_cached_blocks`)."""
        self.synchronize()
        release = self._unmap_block if self.is_expandable else self._release_block
        for pool in sorted(self._pools.values(), key=lambda each: (each.is_small, each.stream)):
            for _, _, block in list(pool.free):
                release(block)

    def segments(self) -> list[Segment]:
        """What is reserved, in order of address (`snapshot`)."""
        found = []
        for _, first in sorted(self._first_blocks.items()):
            for is_unmapped, blocks in groupby(first.onwards(), key=lambda each: each.state == "unmapped"):
                if not is_unmapped:
                    found.append(_segment(list(blocks)))
        return found

    def _pool(self, is_small: bool, stream: int) -> Pool:
        pool = self._pools.get((is_small, stream))
        return pool or self._pools.setdefault((is_small, stream), Pool(stream, is_small, self.is_expandable))

    def _free_block(self, block: Block) -> None:
        """`free_block`."""
        if self.on_event is not None:
            self.on_event("free_completed", block.address, block.requested, block.stream)
        block.state, block.requested, block.tail = "inactive", 0, 0
        block.pool.put(block)

    def _grow(self, pool: Pool, size: int, requested: int) -> Block:
        """A free block of at least that size in new memory, for which the cache is emptied if need
        be (`malloc`).

        PyTorch tries `release_available_cached_blocks` first, which gives back nothing without a
        `max_split_size`.
        """
        add = self._add_pages if self.is_expandable else self._add_segment
        block = add(pool, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = add(pool, size)
        if block is None:
            limit = self.limit_bytes or 0
            if self.on_event is not None:
                self.on_event("oom", limit - self.reserved_bytes, size, pool.stream)
            raise AllocatorOutOfMemory(requested, self.reserved_bytes, self.allocated_bytes, limit)
        return block

    def _add_segment(self, pool: Pool, size: int) -> Block | None:
        """A segment as one free block, or None where the device is full (`alloc_block`)."""
        total = segment_size(size)
        if not self._has_room(total):
            return None
        block = self._new_first_block(pool, total, SEGMENT_STEP_BYTES)
        self._reserve("segment_alloc", block.address, total, pool)
        return block

    def _release_block(self, block: Block) -> None:
        """Give back a free block that is a whole segment (`release_blocks`, `release_block`)."""
        if block.prev is None and block.next is None:
            block.pool.drop(block)
            del self._first_blocks[block.address]
            self._reserve("segment_free", block.address, -block.size, block.pool)

    def _add_pages(self, pool: Pool, size: int) -> Block | None:
        """A free block where there is space to map it, or None; what was mapped till then stays
        (`try_allocate_expandable_block`)."""
        block: Block | None = self._find_space(pool, size)
        while block is not None and (block.state == "unmapped" or block.size < size):
            mapped = 0 if block.state == "unmapped" else block.size
            hole = block.next if mapped else block
            assert hole is not None
            block = self._map_block(hole, min(size - mapped, hole.size))
        if block is not None:
            pool.drop(block)
        return block

    def _find_space(self, pool: Pool, size: int) -> Block:
        """The first of the lowest row of free and unmapped blocks that can hold that size
        (`find_expandable_block`).

        Without one, it is a new segment, with address space for 1 1/8 of the device
        (`ExpandableSegment`) and nothing mapped.
        """
        for _, unmapped in pool.unmapped:
            before = unmapped.prev
            first = before if before is not None and before.state == "inactive" else unmapped
            row = takewhile(lambda each: each.state in ("inactive", "unmapped"), first.onwards())
            if sum(each.size for each in row) >= size:
                return first
        space = UNLIMITED_ADDRESS_BYTES if self.limit_bytes is None else self.limit_bytes + self.limit_bytes // 8
        block = self._new_first_block(pool, round_up(space, pool.page_bytes), pool.page_bytes)
        block.state = "unmapped"
        return pool.put(block)

    def _map_block(self, hole: Block, size: int) -> Block | None:
        """The free block that pages for an unmapped block's first bytes become part of, or None
        (`map_block`, `ExpandableSegment::map`)."""
        pool, address = hole.pool, hole.address
        mapped = round_up(size, pool.page_bytes)
        if not self._has_room(mapped):
            return None
        pool.drop(hole)
        hole.state = "inactive"
        if mapped < hole.size:
            pool.put(hole.split(mapped, "unmapped"))
        block = pool.put(hole)
        self._reserve("segment_map", address, mapped, pool)
        return block

    def _unmap_block(self, block: Block) -> None:
        """Give back the pages inside a free block, and an address space that has no others
        (`unmap_block`, `release_blocks`)."""
        pool = block.pool
        begin = round_up(block.address, pool.page_bytes)
        end = (block.address + block.size) // pool.page_bytes * pool.page_bytes
        if begin >= end:
            return
        pool.drop(block)
        hole = block
        if begin > block.address:
            hole = block.split(begin - block.address, "unmapped")
            pool.put(block)
        hole.state = "unmapped"
        if end - begin < hole.size:
            pool.put(hole.split(end - begin, "inactive"))
        hole = pool.put(hole)
        self._reserve("segment_unmap", begin, begin - end, pool)
        if hole.prev is None and hole.next is None:
            pool.drop(hole)
            del self._first_blocks[hole.address]

    def _new_first_block(self, pool: Pool, size: int, alignment: int) -> Block:
        address = round_up(self._next_address, alignment)
        self._next_address = address + size
        block = self._first_blocks[address] = Block(address, size, pool, "inactive")
        return block

    def _has_room(self, size: int) -> bool:
        return self.limit_bytes is None or self.reserved_bytes + size <= self.limit_bytes

    def _reserve(self, action: Action, address: int, size: int, pool: Pool) -> None:
        self.reserved_bytes += size
        if self.on_event is not None:
            self.on_event(action, address, abs(size), pool.stream)


def segment_size(size: int) -> int:
    """The bytes of a new segment for a rounded request (`get_allocation_size`)."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    return LARGE_SEGMENT_BYTES if size < OWN_SEGMENT_BYTES else round_up(size, SEGMENT_STEP_BYTES)


def _segment(blocks: list[Block]) -> Segment:
    pool, size = blocks[0].pool, sum(each.size for each in blocks)
    infos = tuple(BlockInfo(each.address, each.size, each.requested, each.state) for each in blocks)
    return Segment(blocks[0].address, size, pool.stream, "small" if pool.is_small else "large", pool.is_expandable, infos)


def _expandable_size(block: Block) -> int:
    """What a free block can grow to in place (`get_free_block`)."""
    after = block.next
    return block.size + (after.size if after is not None and after.state == "unmapped" else 0)
