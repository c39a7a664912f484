"""The dry run's memory in the format of `torch.cuda.memory._dump_snapshot`, which PyTorch's memory
visualiser opens (https://pytorch.org/memory_viz, or `python -m torch.cuda._memory_viz trace_plot
FILE`).

Where PyTorch records a Python stack, this snapshot has one frame: what the storage is for. Where
PyTorch records microseconds, it has the number of the event.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from bf16prof.allocator import BlockInfo, Segment
from bf16prof.dry_run.ledger import Ledger, TraceEntry
from bf16prof.files import write_bytes

Frames = list[dict[str, Any]]


def write_snapshot(path: Path, ledger: Ledger) -> None:
    """Write what the ledger's caching allocator did, from the first allocation on, and what it
    holds now."""
    write_bytes(path, pickle.dumps(snapshot(ledger), protocol=4))


def snapshot(ledger: Ledger) -> dict[str, Any]:
    """The snapshot as plain dicts, lists, strings and numbers."""
    assert ledger.allocator is not None, "only a caching allocator has blocks"
    users: dict[int, Frames] = {}
    trace = [_entry(number, entry, ledger, users) for number, entry in enumerate(ledger.trace)]
    return {
        "segments": [_segment(segment, users) for segment in ledger.allocator.segments()],
        "device_traces": [trace],
        "allocator_settings": {"expandable_segments": ledger.allocator.is_expandable},
        "external_annotations": [],
    }


def _entry(number: int, entry: TraceEntry, ledger: Ledger, users: dict[int, Frames]) -> dict[str, Any]:
    """One event of the trace; `users` remembers who uses each address."""
    if entry.action == "alloc":
        component, name = ledger.allocations[entry.allocation - 1].label
        users[entry.address] = [{"name": name, "filename": str(component), "line": 0}]
    frames = users.get(entry.address, [])
    where = {"device_free": entry.address} if entry.action == "oom" else {"addr": entry.address}
    return {"action": entry.action, **where, "size": entry.size, "stream": entry.stream, "time_us": number, "frames": frames}


def _segment(segment: Segment, users: dict[int, Frames]) -> dict[str, Any]:
    active = [block for block in segment.blocks if block.state != "inactive"]
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": sum(block.size for block in active if block.state == "active_allocated"),
        "active_size": sum(block.size for block in active),
        "requested_size": sum(block.requested for block in active),
        "stream": segment.stream,
        "segment_type": segment.pool,
        "segment_pool_id": (0, 0),
        "is_expandable": segment.is_expandable,
        "frames": [],
        "blocks": [_block(block, users) for block in segment.blocks],
    }


def _block(block: BlockInfo, users: dict[int, Frames]) -> dict[str, Any]:
    frames = users.get(block.address, []) if block.state == "active_allocated" else []
    return {"address": block.address, "size": block.size, "requested_size": block.requested, "state": block.state, "frames": frames}
