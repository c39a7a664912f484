"""What the device adds to the tensors themselves: the caching allocator's rounding and cuBLAS workspaces on a GPU, nothing on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.engine.workspace import CUBLAS_NAME, CUBLAS_SOURCE, CUBLAS_THREADS, cublas_workspace_bytes
from bf16prof.estimate.allocation import Allocation, allocation
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES, Gpu
from bf16prof.records import Component


def gpu_additions(tensors: Sequence[Allocation], gpu: Gpu) -> list[Allocation]:
    """The cuBLAS workspaces, and what rounding every block up to 512 bytes adds."""
    workspace = allocation(Component.WORKSPACE, CUBLAS_NAME, [cublas_workspace_bytes(gpu)] * CUBLAS_THREADS, CUBLAS_SOURCE)
    rounding = sum(-size % ALLOCATOR_BLOCK_BYTES for a in tensors for size in a.sizes)
    source = "c10/cuda/CUDACachingAllocator.cpp round_size"
    return [workspace, allocation(Component.ROUNDING, f"blocks rounded up to {ALLOCATOR_BLOCK_BYTES} bytes", rounding, source)]
