"""Puts the face on, for as long as a script runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from unittest import mock

import torch
import torch.distributed as dist

from bf16prof.processes import whole_memory
from bf16prof.scripts.face import around, module
from bf16prof.scripts.face.mode import CudaFace, in_backward
from bf16prof.scripts.face.module import MemoryCounters, Row
from bf16prof.scripts.face.streams import HostAccelerator


@contextlib.contextmanager
def replaced(rows: Iterable[Row]) -> Iterator[None]:
    """Replace, and put back at the end."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in rows:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


@contextlib.contextmanager
def worn(gpu: module.ModelledGpu, home: torch.device) -> Iterator[None]:
    """Inside, CUDA devices are `home`, and `torch.cuda` answers as that GPU."""
    face = CudaFace(home)
    with replaced([*module.replacements(gpu), *around.replacements(home), *in_backward(face)]), face:
        yield


def cpu_as_gpu(index: int, count: int, memory: MemoryCounters) -> module.ModelledGpu:
    """A CPU rank that stands for a GPU; the compute capability is one that has bf16."""
    return module.ModelledGpu(index, count, "CPU", whole_memory(), (9, 0), 1, memory, HostAccelerator())


def gloo_for_nccl() -> Iterator[Row]:
    """What real ranks on CPU need besides: whoever asks for NCCL gets gloo."""
    real_init, real_group = dist.init_process_group, dist.new_group

    def init(backend: str | None = None, *args: object, **kwargs: object) -> None:
        if not dist.is_initialized():
            real_init("gloo", *args, **kwargs)  # type: ignore[arg-type]

    def new_group(*args: object, **kwargs: object) -> object:
        return real_group(*args, **{**kwargs, "backend": None})  # type: ignore[arg-type]

    yield dist, "init_process_group", init
    yield dist, "new_group", new_group
