"""The world of a dry run, entered and left: fake tensors, a fake process group of any size, a
modelled accelerator, the tracker.

What runs inside - our training loop, or somebody's script - is another matter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from bf16prof.allocator import CachingAllocator
from bf16prof.dry_run.client_optimizers import client_optimizers
from bf16prof.dry_run.compiler import leave_out_the_compiler
from bf16prof.dry_run.four_bit import four_bit
from bf16prof.dry_run.hardware.autocast import register_cuda_list
from bf16prof.dry_run.hardware.cuda_operators import cuda_optimizers, register_cuda_operators
from bf16prof.dry_run.hardware.devices import cpu_kernels, cuda_kernels
from bf16prof.dry_run.hardware.triton_kernels import triton_kernels
from bf16prof.dry_run.ledger import Ledger
from bf16prof.dry_run.shims import shims
from bf16prof.dry_run.tracker import GPU, HOST, Tracker
from bf16prof.engine.workspace import cublas_workspace_bytes
from bf16prof.processes import threads_per_rank
from bf16prof.profiles.beside import beside_the_allocator
from bf16prof.profiles.gpus import GPUS_PER_NODE, Gpu


@contextlib.contextmanager
def world(
    world_size: int,
    gpu: Gpu | None,
    *,
    expandable_segments: bool = False,
    rank: int = 0,
    kind: type[Tracker] = Tracker,
    counts_blocks: bool = True,
) -> Iterator[Tracker]:
    """Enter as one of `world_size` ranks, on GPUs of that kind or, without one, on CPUs, with a
    tracker of that kind.

    `counts_blocks`: there is an allocator, with a limit; without it storages count as they are. One
    world per process: DeepSpeed and torch.distributed keep global state.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ |= {"LOCAL_RANK": str(rank % GPUS_PER_NODE), "LOCAL_WORLD_SIZE": str(min(world_size, GPUS_PER_NODE))}
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bf16prof.dry_run.hardware.accelerator import SimulatedCpu, SimulatedGpu

    with contextlib.ExitStack() as stack:
        if gpu is None:
            torch.set_num_threads(threads_per_rank(world_size))  # scratch of many kernels grows with it
            tracker = kind(Ledger(), HOST, cpu_kernels())
            set_accelerator(SimulatedCpu())
        else:
            limit = gpu.memory_bytes - sum(item.bytes for item in beside_the_allocator(world_size, gpu.compute_capability))
            allocator = CachingAllocator(limit, expandable_segments=expandable_segments)
            tracker = kind(Ledger(allocator if counts_blocks else None), GPU, cuda_kernels(gpu), cublas_workspace_bytes(gpu))
            set_accelerator(SimulatedGpu(tracker, gpu.memory_bytes))
            for library in (register_cuda_list(), register_cuda_operators(gpu.compute_capability)):
                stack.callback(library._destroy)
            stack.enter_context(cuda_optimizers())
            stack.enter_context(triton_kernels(gpu))
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        deepspeed.init_distributed()
        leave_out_the_compiler()
        stack.enter_context(shims(tracker, rank))
        stack.enter_context(client_optimizers(on_gpu=gpu is not None))
        stack.enter_context(four_bit(on_gpu=gpu is not None))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        mode.cache_enabled = False  # what was asked before, the tracker's memo answers; a key of this cache takes as long as an answer
        stack.enter_context(tracker)
        yield tracker
