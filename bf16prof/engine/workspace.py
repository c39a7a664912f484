"""Memory that libraries hold inside the caching allocator on behalf of a training step."""

from __future__ import annotations

from bf16prof.profiles.gpus import Gpu

CUBLAS_THREADS = 2
"""A training step runs matrix products in two threads, the main one (forward) and autograd's (backward), each with its own cuBLAS handle
and so its own workspace (aten/src/ATen/cuda/CublasHandlePool.cpp: one per handle and stream)."""

CUBLAS_SOURCE = "ATen/cuda/CublasHandlePool.cpp getChosenWorkspaceSize"


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """PyTorch's default cuBLAS workspace: 32 MiB on Hopper (compute capability 9.0), 2 x 4096 KiB + 8 x 16 KiB on every other GPU."""
    return 32 * 2**20 if gpu.compute_capability == (9, 0) else (2 * 4096 + 8 * 16) * 2**10
