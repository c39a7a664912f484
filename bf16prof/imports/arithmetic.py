"""What an out-of-memory message says by its own numbers: who held what, how much was missing, and
whether fragmentation was to blame."""

from __future__ import annotations

from bf16prof.explanations import MessageAmount
from bf16prof.imports.out_of_memory import Message
from bf16prof.profiles.beside import beside_the_allocator

_MANY = 2
"""What lives beside the allocator is said to be much when it is more than so many times what is
assumed of a job on one node."""

_ONE_NODE = 8
_NOTICEABLE = 64 * 2**20
"""Sizes in a message have two decimals of a GiB: their difference is 30 MiB off at most."""

ALLOCATOR_SETTING = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def amounts(message: Message) -> tuple[MessageAmount, ...]:
    """The numbers in the order in which they are read."""
    beside = "CUDA context, NCCL, other processes: total less free less reserved"
    lines = (
        ("tried to allocate", "tried", ""),
        ("total on the GPU", "total", ""),
        ("free on the GPU", "free", ""),
        ("allocated by PyTorch", "allocated", "live tensors, blocks rounded up"),
        ("reserved by PyTorch", "reserved", "what its caching allocator holds"),
        ("reserved, not allocated", "unallocated", "gaps between live tensors: fragmentation"),
        ("allowed to PyTorch", "allowed", "set_per_process_memory_fraction"),
        ("used by this process", "process", ""),
        ("beside the allocator", "beside", beside),
    )
    found = [MessageAmount(name, message.sizes[key].bytes, meaning) for name, key, meaning in lines if key in message.sizes]
    found += [MessageAmount(f"process {pid}", reading.bytes, "as the driver sees it") for pid, reading in message.processes.items()]
    if needed := message.needed:
        found.append(MessageAmount("needed at least", needed.bytes, "allocated and tried: the live tensors, had there been room"))
    return tuple(found)


def room(message: Message) -> int | None:
    """What the allocator could have had: what it has reserved and what is free, or what it is
    allowed."""
    allowed, reserved, free = (message.bytes(name) for name in ("allowed", "reserved", "free"))
    if allowed is not None:
        return allowed
    return None if reserved is None or free is None else reserved + free


def advice(message: Message) -> tuple[str, ...]:
    """What follows from the numbers alone."""
    return tuple(text for text in (_missing(message), _fragmented(message), _beside(message), _impossible(message)) if text)


def _missing(message: Message) -> str:
    tried, free, limit = message.bytes("tried"), message.bytes("free"), room(message)
    reserved, allowed = message.bytes("reserved"), message.bytes("allowed")
    if tried is None or limit is None or reserved is None:
        return ""
    if allowed is not None and (free is None or allowed - reserved < free):
        return f"the allocator has {_gib(reserved)} of the {_gib(allowed)} that it may have (set_per_process_memory_fraction)"
    more = limit - reserved
    if tried <= more:
        return "the request is smaller than what was free: another process took it, or the request needed one piece of it"
    return f"the allocator lacked {_gib(tried - more)}: {_gib(tried)} tried, {_gib(max(0, more))} free"


def _fragmented(message: Message) -> str:
    tried, unallocated, reserved, limit = (message.bytes("tried"), message.bytes("unallocated"), message.bytes("reserved"), room(message))
    if tried is None or unallocated is None or reserved is None:
        return ""
    rest = max(0, (limit or reserved) - reserved)
    if tried <= unallocated + rest:
        return (
            f"without fragmentation there would be room: {_gib(unallocated)} was reserved and not allocated, in pieces; {ALLOCATOR_SETTING}"
        )
    return f"fragmentation is not the cause: without it {_gib(tried - unallocated - rest)} would still be missing"


def _beside(message: Message) -> str:
    """Who else uses the GPU, where the message tells this process from others; else whether more is
    used than one process takes."""
    total, free, beside = (message.bytes(name) for name in ("total", "free", "beside"))
    if total is None or free is None or beside is None:
        return ""
    processes = [reading.bytes for reading in message.processes.values()]
    own = message.bytes("process")
    ours = [size for size in processes if size >= (message.bytes("reserved") or 0)]
    own = ours[0] if own is None and len(ours) == 1 else own
    if own is not None:
        others = total - free - own
        return f"{_gib(others)} is used by other processes: nvidia-smi shows them" if others > _NOTICEABLE else ""
    assumed = sum(item.bytes for item in beside_the_allocator(_ONE_NODE))
    if beside <= _MANY * assumed:
        return ""
    return f"{_gib(beside)} is used beside the allocator, more than the {_gib(assumed)} assumed of a process: nvidia-smi shows who uses it"


def _impossible(message: Message) -> str:
    allocated, total = message.bytes("allocated"), message.bytes("total")
    if allocated is None or total is None or allocated <= total:
        return ""
    return "more is allocated than the GPU has: the driver lends host memory (Windows), which is slow"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
