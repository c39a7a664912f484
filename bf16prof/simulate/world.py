"""The world of a dry run, entered and left: fake tensors, a fake process group of any size, a modelled accelerator, the tracker.

What runs inside - our training loop, or somebody's script - is another matter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from bf16prof.profiles.gpus import Gpu
from bf16prof.records import Device
from bf16prof.simulate.autocast import register_cuda_list
from bf16prof.simulate.shims import shims
from bf16prof.simulate.tracker import GPU, HOST, Tracker


@contextlib.contextmanager
def world(world_size: int, device: Device, gpu: Gpu | None) -> Iterator[Tracker]:
    """Enter as rank 0 of `world_size` ranks. One world per process: DeepSpeed and torch.distributed keep global state."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bf16prof.simulate.accelerator import SimulatedCpu, SimulatedGpu

    tracker = Tracker(device)
    policy = register_cuda_list() if device is Device.GPU else None
    accelerator = SimulatedCpu() if gpu is None or device is Device.CPU else SimulatedGpu(tracker, gpu.memory_bytes)
    set_accelerator(accelerator)
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        deepspeed.init_distributed()
        with shims(), FakeTensorMode(allow_non_fake_inputs=True), tracker:
            yield tracker
    finally:
        dist.destroy_process_group()
        if policy is not None:
            policy._destroy()  # type: ignore[no-untyped-call]


def torch_device(device: Device) -> torch.device:
    """Where the job's tensors live in a simulated world."""
    return GPU if device is Device.GPU else HOST
