"""Many equal requests in a row, as the allocator takes them together, against the same requests one
by one."""

from __future__ import annotations

import random

import pytest

from bf16prof.allocator import Block, CachingAllocator

MIB = 2**20
ROWS = (1, 2, 7, 700, 5000)
SIZES = (1, 100, 512, 513, 2048, 70_000, MIB, MIB + 1, 3 * MIB, 9 * MIB)


def prepared(seed: int, *, expandable: bool) -> tuple[CachingAllocator, random.Random]:
    """An allocator with holes of many sizes in it."""
    rng = random.Random(seed)
    allocator = CachingAllocator(expandable_segments=expandable)
    blocks = [allocator.allocate(rng.choice((200, 700, 5000, 300_000, 2 * MIB, 7 * MIB, 25 * MIB))) for _ in range(150)]
    for block in rng.sample(blocks, 90):
        allocator.free(block)
    return allocator, rng


def together(allocator: CachingAllocator, size: int, count: int) -> list[Block]:
    blocks = []
    while count:
        blocks.append(allocator.allocate(size, 0, count))
        count -= blocks[-1].requested // size
    return blocks


def told(allocator: CachingAllocator) -> tuple[int, int, int, list[tuple[int, int]]]:
    """What can be seen from outside: the counters, and where memory is free."""
    free = [(b.address, b.size) for s in allocator.segments() for b in s.blocks if b.state == "inactive"]
    return allocator.allocated_bytes, allocator.reserved_bytes, allocator.tail_bytes, free


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_row_of_requests_is_what_single_ones_are(seed: int, *, expandable: bool) -> None:
    one, rng = prepared(seed, expandable=expandable)
    other, _ = prepared(seed, expandable=expandable)
    for _ in range(6):
        size = rng.choice(SIZES)
        count = min(rng.choice(ROWS), 200 * MIB // size)
        row, singles = together(one, size, count), [other.allocate(size) for _ in range(count)]
        assert told(one) == told(other), (size, count)
        assert sum(block.requested for block in row) == size * count
        if rng.random() < 0.7:
            for allocator, blocks in ((one, row), (other, singles)):
                for block in blocks:
                    allocator.free(block)
        assert told(one) == told(other), (size, count)
        assert one.allocate(600).address == other.allocate(600).address
