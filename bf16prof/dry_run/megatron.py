"""What megatron-core needs in the dry run's world: it asks for CUDA devices by name, and its ranks
for each other's objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bf16prof.cases import Job
from bf16prof.dry_run.script.memory import LedgerMemory
from bf16prof.dry_run.script.surroundings import as_seen
from bf16prof.dry_run.tracker import GPU, HOST, Tracker
from bf16prof.profiles.gpus import GPUS_PER_NODE
from bf16prof.scripts.face import around
from bf16prof.scripts.face.module import Row
from bf16prof.scripts.face.worn import replaced, worn


@contextlib.contextmanager
def megatron_world(job: Job, tracker: Tracker, rank: int) -> Iterator[None]:
    """Inside, megatron-core can be built and stepped, as that rank; `world` has been entered."""
    local, count = rank % GPUS_PER_NODE, min(job.case.world_size, GPUS_PER_NODE)
    rows: list[Row] = [(dist, "all_gather_object", _gathered), *_norms()]
    if job.gpu is not None:
        rows += around.tensors(FakeTensor, GPU, local)
    seen = as_seen(job.gpu, local, count, LedgerMemory(tracker.ledger))
    with replaced(rows), worn(seen, HOST if job.gpu is None else GPU):
        yield


def _gathered(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """Every rank's object is this rank's: the groups of parameters are the same everywhere."""
    object_list[:] = [obj] * len(object_list)


def _norms() -> Iterator[Row]:
    """The norm over many gradients, which its stand-in for Apex's kernel reads one by one
    (core/utils.py, local_multi_tensor_l2_norm)."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        yield clip_grads, "l2_norm_impl", _norm


def _norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    norms = [[torch.norm(tensor) for tensor in tensors] for tensors in tensor_lists]
    whole = torch.empty(1, dtype=torch.float32, device=tensor_lists[0][0].device)
    del norms
    return whole, None
