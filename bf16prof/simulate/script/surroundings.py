"""All that a dry-run script finds in the place of the real thing, put there before its first import and taken away in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bf16prof.profiles.gpus import GPUS_PER_NODE, Gpu
from bf16prof.reductions import processor_of
from bf16prof.scripts.face import around, module
from bf16prof.scripts.face.mode import CudaFace
from bf16prof.scripts.imports import changed_when_imported
from bf16prof.simulate.script import arguments, libraries, loaders, parameters, ranks, saving, values
from bf16prof.simulate.script.memory import LedgerMemory
from bf16prof.simulate.script.tracker import ScriptTracker
from bf16prof.simulate.tracker import GPU

Row = tuple[Any, str, Any]


@contextlib.contextmanager
def surroundings(tracker: ScriptTracker, gpu: Gpu | None, world_size: int, rank: int) -> Iterator[None]:
    """Inside, a script can run; `world` has been entered."""
    from deepspeed.accelerator import get_accelerator

    invented = tracker.invented
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, FakeTensorMode), "the world has been entered"
    with contextlib.ExitStack() as stack:
        rows: list[Iterable[Row]] = [
            values.replacements(invented),
            saving.replacements(invented),
            ranks.replacements(invented, "gloo" if gpu is None else "nccl"),
            loaders.replacements(tracker),
            parameters.replacements(tracker, mode),
            [(nn.Module, "compile", lambda self, *_, **__: None)],
        ]
        local = rank % GPUS_PER_NODE
        rows.append(arguments.replacements(local))
        if gpu is not None:
            face = module.Gpu(
                index=local,
                count=min(world_size, GPUS_PER_NODE),
                name=gpu.torch_name or gpu.name,
                total=gpu.memory_bytes,
                capability=gpu.compute_capability,
                processors=processor_of(gpu).multiprocessors,
                memory=LedgerMemory(tracker.ledger),
                accelerator=get_accelerator(),
            )
            rows += [module.replacements(face), around.replacements(GPU), around.tensors(FakeTensor, GPU, local)]
            rows.append(module.of_deepspeed(get_accelerator(), local))
        for owner, name, value in [row for each in rows for row in each]:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        # Distributions check that probabilities are positive, which nobody knows here.
        torch.distributions.Distribution.set_default_validate_args(False)
        stack.enter_context(changed_when_imported(libraries.changes(invented)))
        if gpu is not None:
            stack.enter_context(CudaFace(GPU))
        yield
