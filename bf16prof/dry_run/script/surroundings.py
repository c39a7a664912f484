"""All that a dry-run script finds in the place of the real thing, put there before its first import
and taken away in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bf16prof.dry_run.script import known, libraries, loaders, parameters, ranks, saving, values
from bf16prof.dry_run.script.memory import LedgerMemory
from bf16prof.dry_run.script.tracker import ScriptTracker
from bf16prof.dry_run.tracker import GPU, HOST
from bf16prof.profiles.gpus import GPUS_PER_NODE, Gpu
from bf16prof.reductions import processor_of
from bf16prof.scripts import arguments
from bf16prof.scripts.face import around, module
from bf16prof.scripts.face.module import Row
from bf16prof.scripts.face.worn import cpu_as_gpu, replaced, worn
from bf16prof.scripts.imports import changed_when_imported


@contextlib.contextmanager
def surroundings(tracker: ScriptTracker, gpu: Gpu | None, world_size: int, rank: int) -> Iterator[None]:
    """Inside, a script can run; `world` has been entered."""
    from deepspeed.accelerator import get_accelerator

    invented = tracker.invented
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, FakeTensorMode), "the world has been entered"
    local, count = rank % GPUS_PER_NODE, min(world_size, GPUS_PER_NODE)
    rows: list[Iterable[Row]] = [
        values.replacements(invented),
        saving.replacements(invented),
        ranks.replacements(invented, "gloo" if gpu is None else "nccl"),
        loaders.replacements(tracker),
        parameters.replacements(tracker, mode),
        arguments.replacements(local),
        [(nn.Module, "compile", lambda self, *_, **__: None), (torch, "tensor", known.made_of_values(torch.tensor))],
    ]
    if gpu is not None:
        rows += [around.tensors(FakeTensor, GPU, local), module.of_deepspeed(get_accelerator(), local)]
    # Distributions check that probabilities are positive, which nobody knows here.
    torch.distributions.Distribution.set_default_validate_args(False)
    with (
        replaced(row for each in rows for row in each),
        changed_when_imported(libraries.changes(invented)),
        worn(as_seen(gpu, local, count, LedgerMemory(tracker.ledger)), HOST if gpu is None else GPU),
    ):
        yield


def as_seen(gpu: Gpu | None, index: int, count: int, memory: LedgerMemory) -> module.ModelledGpu:
    """The GPU of this rank as code sees it that asks for one."""
    from deepspeed.accelerator import get_accelerator

    if gpu is None:
        return cpu_as_gpu(index, count, memory)
    return module.ModelledGpu(
        index=index,
        count=count,
        name=gpu.torch_name or gpu.name,
        total=gpu.memory_bytes,
        capability=gpu.compute_capability,
        processors=processor_of(gpu).multiprocessors,
        memory=memory,
        accelerator=get_accelerator(),
    )
