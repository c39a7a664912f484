"""An optimizer on NVMe, run dry by DeepSpeed's own swapper, against one in host memory: the GPU's
bytes, and the host's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import job, profile

from bf16prof.cases import Job
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.layout import partition_numels, sub_groups
from bf16prof.dry_run.hardware.nvme import FileHandle
from bf16prof.dry_run.runner import simulate
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Phase

pytestmark = pytest.mark.timeout(280)

FP32, STATES, BUFFERS = 4, 4, 5
"""Bytes; master parameter, gradient, momentum and variance, which are in host memory with `cpu`;
buffers of the test."""

ALIGNED = 256
"""Elements that a buffer is a multiple of: 1024 bytes for each thread
(runtime/swap_tensor/utils.py, AIO_ALIGNED_BYTES)."""

LEAST_SWAPPED = 2**20
"""Bytes of a tensor below which it stays in memory (the same file, MIN_AIO_BYTES)."""


def offloaded(device: str) -> Job:
    """Four sub-groups of half a million elements on each of two ranks, three of them large enough
    to be swapped."""
    zero = {"device": device, "nvme_path": "/nowhere", "buffer_count": BUFFERS}
    sizes: dict[str, Any] = {"model__hidden_size": 256, "model__num_layers": 4, "model__num_heads": 4, "model__vocab_size": 512}
    sizes |= {"optimizer__torch_adam": False, "optimizer__fused": None}
    settings = profile(deepspeed__zero_optimization__offload_optimizer=zero, deepspeed__zero_optimization__sub_group_size=500_000, **sizes)
    return job(settings, 3, 2)


def test_buffers_take_the_place_of_states_in_host_memory() -> None:
    # GIVEN the same job with its optimizer in host memory and in files
    cpu, nvme = simulate(jobs := [offloaded("cpu"), offloaded("nvme")])

    # THEN the GPU holds the same between steps and until backward, which leaves small gradients
    # there (swap_tensor/optimizer_utils.py, is_swappable_tensor)
    assert nvme.allocated_bytes == cpu.allocated_bytes
    assert (nvme.phases[Phase.INIT], nvme.phases[Phase.FORWARD]) == (cpu.phases[Phase.INIT], cpu.phases[Phase.FORWARD])
    assert (nvme.phases[Phase.BACKWARD].end_bytes or 0) > (cpu.phases[Phase.BACKWARD].end_bytes or 0)
    # and the host so many page-locked buffers in the place of the states of all sub-groups that are
    # large enough to be swapped
    parts = sub_groups(partition_numels(Engine.of(jobs[0]).numels, 2), 500_000)
    swapped = [part for part in parts if FP32 * part >= LEAST_SWAPPED]
    largest = -(-max(parts) // ALIGNED) * ALIGNED
    assert len(swapped) == len(parts) - 1
    assert host_bytes(cpu) - host_bytes(nvme) == FP32 * (STATES * sum(swapped) - BUFFERS * largest)
    assert any(f"{BUFFERS} page-locked buffers of {FP32 * largest:,} bytes" in note for note in nvme.notes)


def test_what_is_page_locked_is_the_storage_and_not_its_address() -> None:
    handle, like = FileHandle(), torch.empty(0)
    locked = handle.new_cpu_locked_tensor(8, like)

    assert FileHandle().is_pinned(locked[2:])
    addresses = set()
    for _ in range(20):
        addresses.add((locked := handle.new_cpu_locked_tensor(8, like)).untyped_storage()._cdata)
    del locked
    others = [torch.empty(8) for _ in range(20)]
    assert addresses & {other.untyped_storage()._cdata for other in others}, "an address is used again"
    assert not any(map(handle.is_pinned, others))
    handle.free_cpu_locked_tensor(freed := handle.new_cpu_locked_tensor(8, like))
    assert not handle.is_pinned(freed)


def host_bytes(record: MemoryRecord) -> int:
    assert record.host_bytes is not None
    return record.host_bytes
