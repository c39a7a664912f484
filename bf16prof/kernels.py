"""Facts of CUDA kernels that the closed form and the dry run share: what a kernel allocates, as a function of sizes alone.

Paths are below `aten/src/ATen/native` in PyTorch.
"""

from __future__ import annotations

from bf16prof.profiles.gpus import DEFAULT_MULTIPROCESSORS
from bf16prof.rounding import ceil_div

FLOAT_BYTES = 4
WARP = 32
MANY_ROWS = 64 * 1024
"""More rows than that are summed in two passes, where they are narrow (cuda/layer_norm_kernel.cu)."""
EMBEDDING_WITHOUT_SORT = 3072
"""Up to so many indices `embedding_dense_backward_cuda` needs no sort (cuda/Embedding.cu)."""
EMBEDDING_ROWS_PER_THREAD = 10
"""`NROWS_PER_THREAD` (cuda/EmbeddingBackwardKernel.cu)."""


def norm_partial_sums(rows: int, width: int, element: int, multiprocessors: int) -> int:
    """Bytes that the backward of a norm takes for the gradient of one weight, `LaunchGammaBetaBackwardCUDAKernel`
    (cuda/layer_norm_kernel.cu): where rows are many and too narrow to fill half of the multiprocessors, partial sums are kept."""
    multiprocessors = multiprocessors or DEFAULT_MULTIPROCESSORS
    if rows <= MANY_ROWS or width // WARP >= multiprocessors // 2:
        return 0
    return min(32 * 1024 // ceil_div(width, WARP), ceil_div(rows, WARP)) * width * element
