"""Memory that libraries hold inside the caching allocator on behalf of a training step."""

from __future__ import annotations

from bf16prof.profiles.gpus import Gpu

CUBLAS_THREADS = 2
"""A training step runs matrix products in two threads, the main one (forward) and autograd's
(backward), each with its own cuBLAS handle and so its own workspace
(aten/src/ATen/cuda/CublasHandlePool.cpp: one per handle and stream)."""

CUBLAS_SOURCE = "ATen/cuda/CublasHandlePool.cpp getChosenWorkspaceSize"


LARGE_WORKSPACE = 32 * 2**20
SMALL_WORKSPACE = (2 * 4096 + 8 * 16) * 2**10
LARGEST_WORKSPACE = 128 * 2**20

WITH_LARGE_WORKSPACE = (9, 10, 12)
"""First numbers of compute capabilities: Hopper's, and since February 2026 Blackwell's
(github.com/pytorch/pytorch pull request 175344)."""

WITH_LARGEST_WORKSPACE = ("gfx94", "gfx95")


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """PyTorch's default cuBLAS workspace, `parseChosenWorkspaceSize`: 32 MiB on Hopper and
    Blackwell, 2 x 4096 KiB + 8 x 16 KiB on earlier GPUs; of hipBLAS, 128 MiB on gfx94x and gfx95x,
    32 MiB on other AMD GPUs."""
    if gpu.architecture:
        return LARGEST_WORKSPACE if gpu.architecture.startswith(WITH_LARGEST_WORKSPACE) else LARGE_WORKSPACE
    return LARGE_WORKSPACE if gpu.compute_capability[0] in WITH_LARGE_WORKSPACE else SMALL_WORKSPACE
