"""A memory snapshot of PyTorch (`torch.cuda.memory._dump_snapshot`): the segments and blocks of the
caching allocator at one moment, and the last events that led there, as long as they were recorded
(`torch.cuda.memory._record_memory_history`).

Blocks carry their size and what was requested; events carry what was requested only
(c10/cuda/CUDACachingAllocator.cpp, `record_trace`). So what is allocated at the moment is exact,
and what was allocated earlier is a lower bound: requests, rounded up to 512 bytes, where the block
is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from bf16prof.imports.finding import Finding, Reading
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.records import Item
from bf16prof.rounding import round_up
from bf16prof.vocabulary import Component

MOST_ITEMS = 200
"""So many places in a program are kept by name; the others are one item."""

MOST_FRAMES = 200
"""So many frames of a stack are looked at."""

MOST_ENTRIES = 5_000_000
"""Blocks and events in all. A pickle can name one list many times: what it unfolds to is not
bounded by the size of its file."""

_LARGEST = 2**60
_SEGMENTS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_ACTIONS = {"alloc", "free_requested", "free_completed", "oom", "snapshot", *_SEGMENTS}


@dataclass(frozen=True)
class _Snapshot:
    """One device of one snapshot."""

    segments: list[Mapping[str, Any]]
    trace: list[Mapping[str, Any]]

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(_size(s, "total_size") for s in self.segments)

    @property
    def allocated(self) -> int:
        """Bytes of the blocks that tensors use."""
        return sum(_size(s, "allocated_size") for s in self.segments)


class SnapshotReader:
    """Reads snapshots; of several ranks or devices the one that holds most counts."""

    format = "memory snapshot of PyTorch"

    def __init__(self) -> None:
        self._snapshots: list[_Snapshot] = []

    def read(self, content: Any) -> tuple[int, int]:
        """Read a snapshot; how many events and segments were understood, and how many events were
        not.

        Raises `ValueError` naming what is not as it should be.
        """
        segments = [_mapping(s, "a segment") for s in _list(content, "segments")]
        unread = [_items(t, "device_traces") for t in _list(content, "device_traces")]
        if sum(map(len, [*unread, *(_items(s.get("blocks"), "blocks") for s in segments)])) > MOST_ENTRIES:
            raise ValueError(f"more than {MOST_ENTRIES:,} blocks and events")
        traces = [[_mapping(e, "an event") for e in trace] for trace in unread]
        by_device: dict[int, list[Mapping[str, Any]]] = {}
        for segment in segments:
            by_device.setdefault(_size(segment, "device") if "device" in segment else 0, []).append(segment)
        devices = sorted({*by_device, *(n for n, trace in enumerate(traces) if trace)})
        found = [_Snapshot(by_device.get(n, []), traces[n] if n < len(traces) else []) for n in devices]
        self._snapshots += found
        events = [_text(event, "action") for one in found for event in one.trace]
        unknown = sum(action not in _ACTIONS for action in events)
        return len(segments) + len(events) - unknown, unknown

    def finding(self) -> Finding | None:
        """What the snapshot that holds most says."""
        if not self._snapshots:
            return None
        most = max(self._snapshots, key=lambda s: (s.allocated, s.reserved))
        allocated = most.allocated
        peak, complete = _allocated_peak(most)
        notes = ["memory between steps is taken to be what was allocated when the snapshot was taken"]
        notes += [f"of the one of {len(self._snapshots)} devices that holds most"] if len(self._snapshots) > 1 else []
        readings = {"allocated_bytes": Reading(allocated), "reserved_bytes": Reading(_reserved_peak(most))}
        if most.trace:
            name = "run_peak_allocated_bytes" if complete else "peak_allocated_bytes"
            readings[name] = Reading(peak, is_floor=True)
            since = "from the first allocation on" if complete else "not from the first allocation on"
            notes.append(f"{len(most.trace):,} events, {since}; the peak is a lower bound, because events carry requests and not blocks")
        failed = [_size(e, "size") for e in most.trace if _text(e, "action") == "oom"]
        failure = f"out of memory {len(failed)} times, the last time for {failed[-1]:,} bytes" if failed else ""
        notes += [f"the allocator ran {failure}"] if failed else []
        return Finding(
            self.format, readings, items=tuple(_holders(most)), notes=tuple(f"{self.format}: {n}" for n in notes), failure=failure
        )


def _allocated_peak(snapshot: _Snapshot) -> tuple[int, bool]:
    """The highest that events and the final state prove, walking backwards, and whether the events
    begin with nothing allocated."""
    alive = {address: block for address, block in _blocks(snapshot) if _text(block, "state") == "active_allocated"}
    level = highest = snapshot.allocated
    for event in reversed(snapshot.trace):
        action = _text(event, "action")
        if action == "alloc":
            block = alive.pop(_size(event, "addr"), None)
            level -= _rounded(event) if block is None else _size(block, "size")
        elif action == "free_requested":
            level += _rounded(event)
        highest = max(highest, level)
    return highest, level == 0 and not alive


def _reserved_peak(snapshot: _Snapshot) -> int:
    level = highest = snapshot.reserved
    for event in reversed(snapshot.trace):
        sign = _SEGMENTS.get(_text(event, "action"))
        level -= sign * _size(event, "size") if sign else 0
        highest = max(highest, level)
    return highest


def _blocks(snapshot: _Snapshot) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The blocks of all segments by address. PyTorch before 2.1 gives no addresses of blocks: they
    follow from the sizes."""
    for segment in snapshot.segments:
        address = _size(segment, "address")
        for block in _items(segment.get("blocks"), "blocks"):
            mapping = _mapping(block, "a block")
            yield _size(mapping, "address") if "address" in mapping else address, mapping
            address += _size(mapping, "size")


def _holders(snapshot: _Snapshot) -> list[Item]:
    """What is allocated, by the place in the program that allocated it, the largest first."""
    sizes: Counter[str] = Counter()
    places: dict[int, str] = {}  # by the list of frames: what one place allocated often names the same list
    for _, block in _blocks(snapshot):
        if _text(block, "state") == "active_allocated":
            frames = block.get("frames")
            if id(frames) not in places:
                places[id(frames)] = _place(frames)
            sizes[places[id(frames)]] += _size(block, "size")
    largest = sizes.most_common(MOST_ITEMS)
    rest = sum(sizes.values()) - sum(size for _, size in largest)
    items = [Item(Component.OTHER, name, size, "the snapshot's stack") for name, size in largest]
    return items + ([Item(Component.OTHER, f"{len(sizes) - MOST_ITEMS} other places", rest)] if rest else [])


def _place(frames: object) -> str:
    """The innermost frame that is not PyTorch's own: `linear (model.py:12)`."""
    stack = [f for f in frames[:MOST_FRAMES] if isinstance(f, Mapping)] if isinstance(frames, list) else []
    outside = (f for f in stack if "/torch/" not in _text(f, "filename") and _text(f, "filename") not in ("??", ""))
    frame = next(outside, stack[0] if stack else {})
    file, line = PurePosixPath(_text(frame, "filename")).name, frame.get("line")
    where = (f" ({file}:{line})" if isinstance(line, int) and line else f" ({file})") if file else ""
    return f"{_text(frame, 'name') or 'unknown place'}{where}"


def _text(table: Mapping[str, Any], key: str) -> str:
    """The text under a key, no longer than anybody reads; empty where there is none."""
    value = table.get(key)
    return value[-300:] if isinstance(value, str) else ""


def _rounded(event: Mapping[str, Any]) -> int:
    return round_up(_size(event, "size"), ALLOCATOR_BLOCK_BYTES)


def _size(table: Mapping[str, Any], key: str) -> int:
    value = table.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < (2**64 if key in ("addr", "address") else _LARGEST):
        raise ValueError(f"{key} is no size or address")
    return value


def _list(content: object, key: str) -> Sequence[Any]:
    return _items(_mapping(content, "the snapshot").get(key), key)


def _items(value: object, name: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no dict")
    return value
