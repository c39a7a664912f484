"""Three loops of DeepSpeed over all ranks, without the ranks.

Each cuts a flat buffer into one view per rank and parameter, only to concatenate the views: Python
work that grows with the world, while the bytes that are allocated do not depend on how many views
they are cut into. Here the same storages are allocated in the same order.

A loop is replaced only where its source is the one that these lines were written for (`KNOWN`);
where DeepSpeed has changed it, its own loop runs: slower, never wrong.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero import partition_parameters, stage3
from torch import Tensor

Handle = partition_parameters.AllGatherCoalescedHandle

KNOWN = {
    "class AllGatherCoalescedHandle": {"349a5baf86c73afb"},
    "def _all_gather_dtype(": {"842af9b32ce5af40", "c96f0b2d947168f7"},
    "def reduce_scatter_coalesced(": {"77ff474e10e5bad0"},
}
"""Digests of the blocks of source that are replaced, by their first line, in DeepSpeed 0.18.3 to
0.19.8."""


class Pieces(Protocol):
    """Who counts storages, and can be told that one stands for many (`Tracker`)."""

    def in_pieces(self, count: int) -> AbstractContextManager[None]:
        """Inside, a new storage stands for so many equal ones."""
        ...


def replacements(counting: Pieces, rank: int = 0) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and replacement of every loop whose source is known; `rank` is the one that is
    run."""
    if _is_known(partition_parameters, "class AllGatherCoalescedHandle"):
        yield Handle, "wait", _wait
    if rank == 0 and _is_known(partition_parameters, "def _all_gather_dtype("):
        yield partition_parameters, "range", _range
    if _is_known(coalesced_collectives, "def reduce_scatter_coalesced("):
        replacement = functools.partial(_reduce_scatter_coalesced, counting)
        yield coalesced_collectives, "reduce_scatter_coalesced", replacement
        yield stage3, "reduce_scatter_coalesced", replacement


def _is_known(module: ModuleType, header: str) -> bool:
    return digest(inspect.getsource(module), header) in KNOWN[header]


def digest(source: str, header: str) -> str:
    """A short digest of the block that starts with this line, without its comments, blank lines and
    indentation; empty if there is none."""
    lines = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    first = next((i for i, line in enumerate(lines) if line.strip().startswith(header)), None)
    if first is None:
        return ""
    outside = (i for i in range(first + 1, len(lines)) if _indent(lines[i]) <= _indent(lines[first]) and lines[i].strip()[0] != ")")
    last = next(outside, len(lines))
    block = [lines[first], *(line.strip() for line in lines[first + 1 : last])]
    return hashlib.sha256("\n".join(block).encode()).hexdigest()[:16]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _range(*bounds: int) -> range:
    """`range` for `partition_parameters`: of the views that `_all_gather_dtype` makes, one per
    rank, only this rank's (0) is ever used."""
    caller = sys._getframe(1).f_code.co_name
    return builtins.range(1) if caller == "_all_gather_dtype" else builtins.range(*bounds)


_REAL_WAIT = Handle.wait


def _wait(self: Any, handle_dependency: bool = True) -> None:
    """Every parameter of an all-gather bucket becomes a copy of its pieces, in one concatenation
    per parameter."""
    if self.complete or self.quantization:
        _REAL_WAIT(self, handle_dependency)
        return
    self.allgather_handle.wait()
    gathered = self.partitions[0]
    overlapping = not get_accelerator().is_synchronized_device()
    for parameter in self.params:
        whole = torch.empty(parameter.ds_numel, dtype=gathered.dtype, device=gathered.device)
        parameter.data = whole.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
        del whole  # in DeepSpeed nothing holds it either, once it is cast
        parameter.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
        if overlapping and handle_dependency:
            gathered.record_stream(get_accelerator().current_stream())
    self.complete = True
    if overlapping and not handle_dependency:
        Handle.data_buffer.append([gathered])


@torch.no_grad()
def _reduce_scatter_coalesced(counting: Pieces, tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """A bucket of gradients, interleaved by rank in one concatenation and reduced; this rank's
    piece of each."""
    world_size, rank = comm.get_world_size(group), comm.get_rank(group)
    pieces = [math.ceil(tensor.numel() / world_size) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % world_size == 0:
        flat = tensors[0].view(-1)
    else:
        padding = [_padding(counting, tensor, piece, world_size) for tensor, piece in zip(tensors, pieces, strict=True)]
        flat = torch.empty(sum(pieces) * world_size, dtype=tensors[0].dtype, device=tensors[0].device)
        del padding
    flat.div_(world_size)
    mine = flat.narrow(0, rank * sum(pieces), sum(pieces))
    comm.reduce_scatter_fn(mine, flat, group=group, async_op=False)
    starts = [sum(pieces[:index]) for index in range(len(pieces))]
    held = [max(0, min(tensor.numel() - rank * piece, piece)) for tensor, piece in zip(tensors, pieces, strict=True)]
    return [mine.narrow(0, start, size) for start, size in zip(starts, held, strict=True)]


def _padding(counting: Pieces, tensor: Tensor, piece: int, world_size: int) -> list[Tensor]:
    """What fills the ranks whose piece of the tensor is short: one whole piece for each rank
    without any, the rest for one.

    The whole pieces, of which there are nearly as many as ranks, are one tensor here that counts as
    so many.
    """
    count, rest = divmod(piece * world_size - tensor.numel(), piece)
    padding = []
    if count:
        with counting.in_pieces(count):
            padding.append(torch.empty(piece * count, dtype=tensor.dtype, device=tensor.device))
    if rest:
        padding.append(torch.empty(rest, dtype=tensor.dtype, device=tensor.device))
    return padding
