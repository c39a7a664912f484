"""What the device adds to the tensors themselves: the caching allocator's rounding and cuBLAS workspaces on a GPU, nothing on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.estimate.allocation import Allocation, allocation
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES, Gpu
from bf16prof.records import Component

CUBLAS_THREADS = 2
"""A training step runs matrix products in two threads, the main one (forward) and autograd's (backward), each with its own cuBLAS handle
and so its own workspace (aten/src/ATen/cuda/CublasHandlePool.cpp: one per handle and stream)."""


def gpu_additions(tensors: Sequence[Allocation], gpu: Gpu) -> list[Allocation]:
    """The cuBLAS workspaces, and what rounding every block up to 512 bytes adds."""
    workspace = allocation(
        Component.WORKSPACE,
        "cuBLAS workspaces",
        [cublas_workspace_bytes(gpu)] * CUBLAS_THREADS,
        "ATen/cuda/CublasHandlePool.cpp getChosenWorkspaceSize",
    )
    rounding = sum(-size % ALLOCATOR_BLOCK_BYTES for a in tensors for size in a.sizes)
    source = "c10/cuda/CUDACachingAllocator.cpp round_size"
    return [workspace, allocation(Component.ROUNDING, f"blocks rounded up to {ALLOCATOR_BLOCK_BYTES} bytes", rounding, source)]


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """PyTorch's default cuBLAS workspace: 32 MiB on Hopper (compute capability 9.0), 2 x 4096 KiB + 8 x 16 KiB on every other GPU."""
    return 32 * 2**20 if gpu.compute_capability == (9, 0) else (2 * 4096 + 8 * 16) * 2**10
