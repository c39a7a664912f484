"""The model of PyTorch's caching allocator against what its source and its own tests on GPUs say,
and against a naive one.

Sizes are from c10/cuda/CUDACachingAllocator.cpp: blocks of 512 bytes, a small pool up to 1 MiB in
segments of 2 MiB, a large pool in segments of 20 MiB, and from 10 MiB on segments of their own,
multiples of 2 MiB.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bf16prof.allocator import Action, AllocatorOutOfMemory, Block, CachingAllocator, Segment

KIB, MIB = 1 << 10, 1 << 20


def in_use(gpu: CachingAllocator) -> tuple[int, int]:
    return gpu.allocated_bytes, gpu.reserved_bytes


def blocks(segment: Segment) -> list[tuple[int, str]]:
    return [(block.size, block.state) for block in segment.blocks]


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # the remainder of 1 MiB stays with the block
        (19 * MIB + 512 * KIB, 20 * MIB, 20 * MIB),
    ],
)
def test_a_request_costs_a_block_of_a_segment(size: int, allocated: int, reserved: int) -> None:
    gpu = CachingAllocator()

    block = gpu.allocate(size)

    assert in_use(gpu) == (allocated, reserved)
    assert (block.size, block.requested) == (allocated, size)
    assert gpu.tail_bytes == allocated - -(-size // 512) * 512


def test_no_bytes_cost_nothing() -> None:
    gpu = CachingAllocator()

    block = gpu.allocate(0)
    gpu.record_stream(block, 1)
    gpu.free(block)

    assert block.size == 0
    assert in_use(gpu) == (0, 0)
    assert not gpu.segments()
    with pytest.raises(ValueError, match="-1 bytes"):
        gpu.allocate(-1)


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize(
    ("size", "segments", "reserved", "reserved_if_expandable", "emptied", "emptied_if_expandable"),
    [
        (512, 1, 2 * MIB, 2 * MIB, 2 * MIB, 2 * MIB),
        (MIB, 2, 4 * MIB, 4 * MIB, 2 * MIB, 2 * MIB),
        (MIB + 512, 1, 20 * MIB, 20 * MIB, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 2, 40 * MIB, 40 * MIB, 20 * MIB, 40 * MIB),
        (10 * MIB + 512, 3, 36 * MIB, 40 * MIB, 12 * MIB, 20 * MIB),
    ],
)
def test_pytorchs_own_expectations_hold(  # noqa: PLR0917 - a row of its table
    size: int, segments: int, reserved: int, reserved_if_expandable: int, emptied: int, emptied_if_expandable: int, expandable: bool
) -> None:
    """`cases` of test_graph_memory_stats_and_use_result_after_destroy_graph in PyTorch's
    test/test_cuda.py, which runs on GPUs."""
    # GIVEN its program: b = a.clone(), then five times b = b.clone() + 1
    gpu = CachingAllocator(expandable_segments=expandable)
    b = gpu.allocate(size)
    for _ in range(5):
        clone = gpu.allocate(size)
        total = gpu.allocate(size)
        gpu.free(clone)
        gpu.free(b)
        b = total

    # THEN it has that many segments and bytes
    assert in_use(gpu) == (size, reserved_if_expandable if expandable else reserved)
    assert expandable or len(gpu.segments()) == segments

    # AND that many where the cache is emptied
    gpu.empty_cache()
    assert in_use(gpu) == (size, emptied_if_expandable if expandable else emptied)


def test_a_freed_block_merges_with_free_neighbours() -> None:
    # GIVEN a segment of 2 MiB with three blocks in front
    gpu = CachingAllocator()
    first, second, third = (gpu.allocate(512 * KIB) for _ in range(3))
    (segment,) = gpu.segments()
    assert blocks(segment) == [(512 * KIB, "active_allocated")] * 3 + [(512 * KIB, "inactive")]

    # WHEN the outer ones are freed, THEN the last has merged with the rest of the segment
    gpu.free(first)
    gpu.free(third)
    (segment,) = gpu.segments()
    assert blocks(segment) == [(512 * KIB, "inactive"), (512 * KIB, "active_allocated"), (MIB, "inactive")]
    assert [block.requested for block in segment.blocks] == [0, 512 * KIB, 0]

    # WHEN the middle one is freed, THEN the segment is one block and stays reserved
    gpu.free(second)
    (segment,) = gpu.segments()
    assert blocks(segment) == [(2 * MIB, "inactive")]
    assert in_use(gpu) == (0, 2 * MIB)
    with pytest.raises(ValueError, match="not allocated"):
        gpu.free(second)
    with pytest.raises(ValueError, match="not allocated"):
        gpu.record_stream(second, 1)


def test_the_smallest_block_that_fits_is_taken_and_of_several_the_lowest() -> None:
    # GIVEN free blocks of 40, 30 and 30 MiB
    gpu = CachingAllocator()
    held = [gpu.allocate(size * MIB) for size in (40, 30, 30)]
    addresses = [block.address for block in held]
    for block in reversed(held):
        gpu.free(block)

    # WHEN 29 MiB are wanted three times
    taken = [gpu.allocate(29 * MIB) for _ in range(3)]

    # THEN the tails of 1 MiB stay with the 30 MiB, and only the remainder of the 40 is split off
    assert [block.address for block in taken] == [addresses[1], addresses[2], addresses[0]]
    assert [block.size for block in taken] == [30 * MIB, 30 * MIB, 29 * MIB]
    assert gpu.tail_bytes == 2 * MIB
    assert in_use(gpu) == (89 * MIB, 100 * MIB)


def test_streams_share_no_memory() -> None:
    gpu = CachingAllocator()
    gpu.free(gpu.allocate(512, stream=7))

    block = gpu.allocate(512, stream=8)

    assert block.stream == 8
    assert [segment.stream for segment in gpu.segments()] == [7, 8]
    assert in_use(gpu) == (512, 4 * MIB)


def test_what_another_stream_uses_comes_back_at_the_next_allocation() -> None:
    # GIVEN a block that another stream uses
    gpu = CachingAllocator()
    block = gpu.allocate(MIB)
    gpu.record_stream(block, 0)
    gpu.record_stream(block, 1)
    gpu.record_stream(block, 2)

    # WHEN it is freed, THEN it is no longer allocated, yet not free
    gpu.free(block)
    assert gpu.allocated_bytes == 0
    (segment,) = gpu.segments()
    assert blocks(segment) == [(MIB, "active_pending_free"), (MIB, "inactive")]
    assert segment.blocks[0].requested == MIB
    with pytest.raises(ValueError, match="not allocated"):
        gpu.free(block)

    # AND the next allocation, for which the events are looked at, can have it
    assert gpu.allocate(MIB).address == segment.address


def test_what_its_own_stream_uses_is_free_at_once() -> None:
    gpu = CachingAllocator()
    block = gpu.allocate(MIB, stream=3)
    gpu.record_stream(block, 3)

    gpu.free(block)

    assert blocks(gpu.segments()[0]) == [(2 * MIB, "inactive")]


def test_synchronizing_frees_what_other_streams_used() -> None:
    gpu = CachingAllocator()
    block = gpu.allocate(MIB)
    gpu.record_stream(block, 1)
    gpu.free(block)

    gpu.synchronize()

    assert blocks(gpu.segments()[0]) == [(2 * MIB, "inactive")]


def test_the_cache_is_given_back_before_memory_runs_out() -> None:
    # GIVEN a full device, half of it cached, a piece of that still in use
    gpu = CachingAllocator(80 * MIB)
    gpu.free(gpu.allocate(40 * MIB))
    split = [gpu.allocate(5 * MIB), gpu.allocate(5 * MIB)]
    gpu.free(gpu.allocate(40 * MIB - 512, stream=1))
    gpu.free(split[1])
    assert in_use(gpu) == (5 * MIB, 80 * MIB)

    # WHEN a request fits no free block
    gpu.allocate(36 * MIB)

    # THEN the segment without an active block made room for it
    assert gpu.retries == 1
    assert in_use(gpu) == (41 * MIB, 76 * MIB)


@pytest.mark.parametrize("expandable", [False, True])
def test_memory_runs_out_and_the_limit_can_be_lifted(expandable: bool) -> None:
    # GIVEN a device that is half full
    events: list[tuple[Action, int, int, int]] = []
    gpu = CachingAllocator(80 * MIB, expandable_segments=expandable, on_event=lambda *event: events.append(event))
    first = gpu.allocate(40 * MIB)

    # WHEN it cannot have as much again and a byte
    with pytest.raises(AllocatorOutOfMemory) as caught:
        gpu.allocate(40 * MIB + 1)

    # THEN the verdict says so, and crosses from one process to another
    verdict = pickle.loads(pickle.dumps(caught.value))
    assert (verdict.requested_bytes, verdict.limit_bytes) == (40 * MIB + 1, 80 * MIB)
    assert (verdict.allocated_bytes, verdict.reserved_bytes) == in_use(gpu) == (40 * MIB, 40 * MIB)
    assert str(verdict) == "no room for 41943041 bytes: of 83886080, 41943040 are reserved already"
    assert events[-1] == ("oom", 40 * MIB, 40 * MIB + 512, 0)
    assert gpu.retries == 1

    # AND the allocator is as good as before, also for more than the device has
    gpu.free(first)
    gpu.free(gpu.allocate(80 * MIB))
    gpu.lift_limit()
    gpu.allocate(200 * MIB)
    assert gpu.allocated_bytes == 200 * MIB


def test_only_whole_segments_are_given_back() -> None:
    gpu = CachingAllocator()
    kept, freed = gpu.allocate(2 * MIB), gpu.allocate(2 * MIB)
    other = gpu.allocate(40 * MIB)
    for block in (freed, other):
        gpu.record_stream(block, 1)
        gpu.free(block)

    gpu.empty_cache()

    assert in_use(gpu) == (2 * MIB, 20 * MIB)
    assert [segment.address for segment in gpu.segments()] == [kept.address]


def test_an_expandable_segment_grows_in_place() -> None:
    # GIVEN one with a page of 20 MiB, 15 of them in use
    gpu = CachingAllocator(expandable_segments=True)
    first = gpu.allocate(15 * MIB)
    assert in_use(gpu) == (15 * MIB, 20 * MIB)

    # WHEN there are 5 MiB for a request of 15, THEN they are extended by one page
    second = gpu.allocate(15 * MIB)
    assert second.address == first.address + 15 * MIB
    assert in_use(gpu) == (30 * MIB, 40 * MIB)
    (segment,) = gpu.segments()
    assert segment.is_expandable
    assert blocks(segment) == [(15 * MIB, "active_allocated")] * 2 + [(10 * MIB, "inactive")]

    # AND nothing of 512 bytes and more is left to a large block as a tail
    gpu.allocate(10 * MIB - 512)
    assert gpu.tail_bytes == 0
    assert blocks(gpu.segments()[0])[-1] == (512, "inactive")

    # AND small blocks have a segment of their own, with pages of 2 MiB
    gpu.allocate(MIB)
    assert gpu.reserved_bytes == 42 * MIB


def test_what_can_grow_is_spared_for_larger_requests() -> None:
    # GIVEN free blocks of 16 MiB between others and of 14 MiB at the end of the segment
    gpu = CachingAllocator(expandable_segments=True)
    hole, _ = gpu.allocate(16 * MIB), gpu.allocate(10 * MIB)
    gpu.free(hole)
    assert blocks(gpu.segments()[0]) == [(16 * MIB, "inactive"), (10 * MIB, "active_allocated"), (14 * MIB, "inactive")]

    # THEN the one of 16 is the better fit, since the other is as large as what it could grow to
    assert gpu.allocate(12 * MIB).address == gpu.segments()[0].address


def test_free_pages_of_an_expandable_segment_are_given_back_and_filled_again() -> None:
    # GIVEN three pages, of which a block of 30 MiB in front is freed
    events: list[tuple[Action, int, int, int]] = []
    gpu = CachingAllocator(expandable_segments=True, on_event=lambda *event: events.append(event))
    front, back = gpu.allocate(30 * MIB), gpu.allocate(30 * MIB)
    base = front.address
    gpu.free(front)

    # WHEN the cache is emptied, THEN one page goes, and the half that shares a page with the other
    # block stays
    events.clear()
    gpu.empty_cache()
    assert events == [("segment_unmap", base, 20 * MIB, 0)]
    (segment,) = gpu.segments()
    assert segment.address == base + 20 * MIB
    assert blocks(segment) == [(10 * MIB, "inactive"), (30 * MIB, "active_allocated")]

    # AND the gap is the first place where the segment grows again
    gpu.allocate(25 * MIB)
    assert ("segment_map", base, 20 * MIB, 0) in events
    assert blocks(gpu.segments()[0]) == [(25 * MIB, "active_allocated"), (5 * MIB, "inactive"), (30 * MIB, "active_allocated")]
    assert gpu.reserved_bytes == 60 * MIB
    assert back.address == base + 30 * MIB


def test_events_are_those_of_a_memory_snapshot() -> None:
    events: list[tuple[Action, int, int, int]] = []
    gpu = CachingAllocator(on_event=lambda *event: events.append(event))

    block = gpu.allocate(5000, stream=4)
    at = block.address
    gpu.record_stream(block, 5)
    gpu.free(block)
    gpu.empty_cache()

    assert events == [
        ("segment_alloc", at, 2 * MIB, 4),
        ("alloc", at, 5000, 4),
        ("free_requested", at, 5000, 4),
        ("free_completed", at, 5000, 4),
        ("segment_free", at, 2 * MIB, 4),
    ]


@dataclass
class NaiveSegment:
    """A stretch of addresses, what is used of it, and which of its pages are backed by memory.

    A use is [offset, size, requested, whether it is freed and pending, whether another stream uses
    it].
    """

    stream: int
    small: bool
    size: int
    page: int
    mapped: set[int] = field(default_factory=set)
    used: list[list[int]] = field(default_factory=list)

    def gaps(self) -> list[tuple[int, int]]:
        edges = [0, *(edge for offset, size, *_ in sorted(self.used) for edge in (offset, offset + size)), self.size]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def pieces(self) -> Iterator[tuple[int, int, bool]]:
        """Each unused (begin, end), and whether memory backs it."""
        for begin, end in self.gaps():
            at = begin
            while at < end:
                backed, stop = at // self.page in self.mapped, end
                pages = range(at // self.page, -(-end // self.page)) if backed else sorted(self.mapped)
                for page in pages:
                    if page * self.page > at and (page in self.mapped) != backed:
                        stop = min(end, page * self.page)
                        break
                yield at, stop, backed
                at = stop


class Naive:
    """The same rules without any data structure: every question is answered by looking at all
    segments."""

    def __init__(self, limit: int | None, expandable: bool) -> None:
        self.limit, self.expandable = limit, expandable
        self.segments: list[NaiveSegment | None] = []
        self.retries = 0

    def live(self) -> list[tuple[int, NaiveSegment]]:
        return [(index, segment) for index, segment in enumerate(self.segments) if segment is not None]

    def reserved(self) -> int:
        return sum(len(segment.mapped) * segment.page for _, segment in self.live())

    def allocated(self) -> int:
        return sum(size for _, segment in self.live() for _, size, _, pending, _ in segment.used if not pending)

    def tails(self) -> int:
        return sum(size - -(-asked // 512) * 512 for _, each in self.live() for _, size, asked, pending, _ in each.used if not pending)

    def back(self, segment: NaiveSegment | None, page: int, pages: int) -> bool:
        assert segment is not None
        if self.limit is not None and self.reserved() + pages * segment.page > self.limit:
            return False
        segment.mapped |= set(range(page, page + pages))
        return True

    def complete(self) -> None:
        for _, segment in self.live():
            segment.used = [use for use in segment.used if not use[3]]

    def release(self) -> None:
        self.complete()
        for index, segment in self.live():
            kept = {page for o, size, *_ in segment.used for page in range(o // segment.page, -(-(o + size) // segment.page))}
            if segment.mapped and not kept:
                self.segments[index] = None
            segment.mapped &= kept

    def best(self, size: int, stream: int) -> tuple[int, int, int] | None:
        found = []
        for index, segment in self.live():
            pieces = [*segment.pieces(), (0, 0, True)] if (segment.stream, segment.small) == (stream, size <= MIB) else []
            for (begin, end, backed), (after, until, more) in pairwise(pieces):
                if backed and end - begin >= size:
                    found.append((end - begin, index, begin, end - begin + (until - after if after == end and not more else 0)))
        found.sort()
        while self.expandable and len(found) > 1 and found[1][3] < found[0][3]:
            del found[0]
        return found[0][:3] if found else None

    def grow(self, size: int, stream: int) -> bool:
        if self.expandable:
            return self.grow_in_place(size, stream)
        total = 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.segments.append(NaiveSegment(stream, size <= MIB, total, total))
        return self.back(self.segments[-1], 0, 1)

    def grow_in_place(self, size: int, stream: int) -> bool:
        page = 2 * MIB if size <= MIB else 20 * MIB
        for _, segment in self.live():
            if (segment.stream, segment.small) == (stream, size <= MIB):
                for begin, end in segment.gaps():
                    if end - begin >= size and any(begin <= a < end and not backed for a, _, backed in segment.pieces()):
                        holes = [(a, b) for a, b, backed in segment.pieces() if begin <= a < begin + size and not backed]
                        return all(self.back(segment, a // page, -(-(min(b, begin + size) - a) // page)) for a, b in holes)
        space = 10**15 if self.limit is None else self.limit * 9 // 8
        self.segments.append(NaiveSegment(stream, size <= MIB, -(-space // page) * page, page))
        return size <= space and self.grow_in_place(size, stream)

    def allocate(self, asked: int, stream: int) -> tuple[int, list[int]] | None:
        """The number of the segment and the use of it, or None where memory runs out."""
        self.complete()
        size = -(-asked // 512) * 512
        if self.best(size, stream) is None and not self.grow(size, stream):
            self.release()
            self.retries += 1
            if not self.grow(size, stream):
                return None
        best = self.best(size, stream)
        assert best is not None
        free, index, offset = best
        segment = self.segments[index]
        assert segment is not None
        if not (segment.small or self.expandable) and free - size <= MIB:
            size = free
        segment.used.append([offset, size, asked, 0, 0])
        return index, segment.used[-1]


EDGES = [1, 512, 513, MIB, MIB + 1, 3 * MIB, 9 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB, 19 * MIB, 20 * MIB, 21 * MIB + 1, 50 * MIB]
SIZES = st.sampled_from(EDGES) | st.integers(1, 2 * MIB) | st.integers(1, 40 * MIB)
STREAMS = st.integers(0, 1)
CALLS = st.one_of(
    st.tuples(st.just("allocate"), SIZES, STREAMS),
    st.tuples(st.sampled_from(["free", "free", "free", "use"]), st.integers(0, 1000), STREAMS),
    st.tuples(st.sampled_from(["synchronize", "empty_cache"]), st.just(0), STREAMS),
)
TRACES = st.lists(CALLS, max_size=60)
LIMITS = st.sampled_from([None, 30 * MIB, 64 * MIB, 150 * MIB])


class Replay:
    """One trace on both allocators, which must agree after every call."""

    def __init__(self, limit: int | None, expandable: bool) -> None:
        self.gpu, self.naive = CachingAllocator(limit, expandable_segments=expandable), Naive(limit, expandable)
        self.held: list[tuple[Block, int, list[int]]] = []
        self.bases: dict[int, int] = {}

    def run(self, name: str, argument: int, stream: int) -> None:
        if name == "allocate":
            self.allocate(argument, stream)
        elif name in {"free", "use"} and self.held:
            block, index, use = self.held[argument % len(self.held)]
            if name == "use":
                self.gpu.record_stream(block, stream)
                use[4] |= stream != block.stream
                return
            self.held.remove((block, index, use))
            self.gpu.free(block)
            use[3] = 1
            if not use[4]:
                segment = self.naive.segments[index]
                assert segment is not None
                segment.used.remove(use)
        elif name == "synchronize":
            self.gpu.synchronize()
            self.naive.complete()
        elif name == "empty_cache":
            self.gpu.empty_cache()
            self.naive.release()

    def allocate(self, size: int, stream: int) -> None:
        expected = self.naive.allocate(size, stream)
        if expected is None:
            with pytest.raises(AllocatorOutOfMemory):
                self.gpu.allocate(size, stream)
            return
        block, (index, use) = self.gpu.allocate(size, stream), expected
        assert (block.address, block.size) == (self.bases.setdefault(index, block.address - use[0]) + use[0], use[1])
        self.held.append((block, index, use))

    def agree(self) -> None:
        gpu, naive = self.gpu, self.naive
        assert in_use(gpu) == (naive.allocated(), naive.reserved())
        assert (gpu.retries, gpu.tail_bytes) == (naive.retries, naive.tails())


@given(TRACES, LIMITS, st.booleans())
@settings(deadline=None, max_examples=150)
def test_any_trace_gives_what_the_naive_allocator_gives(trace: list[tuple[str, int, int]], limit: int | None, expandable: bool) -> None:
    replay = Replay(limit, expandable)
    for call in trace:
        replay.run(*call)
        replay.agree()

    # AND segments lie one above the other, and their blocks are where the naive allocator has them
    bases = [replay.bases[index] for index in sorted(replay.bases)]
    assert bases == sorted(set(bases))
    assert all(base % (2 * MIB) == 0 for base in bases)
    expected = set()
    for index, segment in replay.naive.live():
        base = replay.bases.get(index, 0)
        expected |= {(base + begin, end - begin, "inactive") for begin, end, backed in segment.pieces() if backed}
        expected |= {(base + use[0], use[1], "active_pending_free" if use[3] else "active_allocated") for use in segment.used}
    assert {(block.address, block.size, block.state) for segment in replay.gpu.segments() for block in segment.blocks} == expected


@given(TRACES, LIMITS, st.booleans())
@settings(deadline=None, max_examples=100)
def test_segments_are_tiled_by_blocks_after_any_call(trace: list[tuple[str, int, int]], limit: int | None, expandable: bool) -> None:
    replay = Replay(limit, expandable)
    for call in trace:
        replay.run(*call)

        segments = replay.gpu.segments()
        assert replay.gpu.allocated_bytes <= replay.gpu.reserved_bytes == sum(segment.size for segment in segments)
        for segment in segments:
            assert segment.address == segment.blocks[0].address
            assert segment.size == sum(block.size for block in segment.blocks)
            for block, after in pairwise(segment.blocks):
                assert block.address + block.size == after.address
                assert (block.state, after.state) != ("inactive", "inactive")
        for one, other in pairwise(segments):
            assert one.address + one.size <= other.address

    for held, *_ in replay.held:
        replay.gpu.free(held)
    replay.gpu.empty_cache()
    assert in_use(replay.gpu) == (0, 0)
    assert not replay.gpu.segments()


@given(TRACES, LIMITS, st.booleans())
@settings(deadline=None, max_examples=50)
def test_events_add_up_to_the_counters(trace: list[tuple[str, int, int]], limit: int | None, expandable: bool) -> None:
    # GIVEN the bytes that a trace's events map and unmap, and how often each occurs
    replay, reserved, count = Replay(limit, expandable), 0, Counter[str]()

    def add(action: Action, _: int, size: int, __: int) -> None:
        nonlocal reserved
        count[action] += 1
        reserved += {"segment_alloc": size, "segment_map": size, "segment_free": -size, "segment_unmap": -size}.get(action, 0)

    replay.gpu.on_event = add
    for call in trace:
        replay.run(*call)

    assert reserved == replay.gpu.reserved_bytes
    assert count["alloc"] - count["free_requested"] == len(replay.held)
    active = [block for segment in replay.gpu.segments() for block in segment.blocks if block.state != "inactive"]
    assert count["alloc"] - count["free_completed"] == len(active)
