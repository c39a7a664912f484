"""What the device adds to the tensors themselves: the caching allocator's rounding and cuBLAS
workspaces on a GPU, nothing on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.engine.labels import CUBLAS_WORKSPACES, WHOLE_BLOCKS
from bf16prof.engine.workspace import CUBLAS_SOURCE, CUBLAS_THREADS, cublas_workspace_bytes
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES, Gpu


def gpu_additions(tensors: Sequence[Storages], gpu: Gpu) -> list[Storages]:
    """The cuBLAS workspaces, and what rounding every block up adds."""
    workspace = allocation(CUBLAS_WORKSPACES, [cublas_workspace_bytes(gpu)] * CUBLAS_THREADS, CUBLAS_SOURCE)
    rounding = sum(-size % ALLOCATOR_BLOCK_BYTES for a in tensors for size in a.sizes)
    source = "c10/cuda/CUDACachingAllocator.cpp round_size"
    return [workspace, allocation(WHOLE_BLOCKS, rounding, source)]
