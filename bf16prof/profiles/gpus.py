"""The table of GPUs: memory, arithmetic, memory bandwidth and links, each with its source (`gpus.toml`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bf16prof.profiles.shipped import named, shipped_table
from bf16prof.records import STRICT

ALLOCATOR_BLOCK_BYTES = 512
"""`kMinBlockSize` of PyTorch's CUDA caching allocator: every block is a multiple of it (c10/cuda/CUDACachingAllocator.h)."""

ALLOCATOR_SEGMENT_BYTES = 2 << 20
"""What the size of every segment is a multiple of: of the small pool's, of the large pool's, and of the pages of expandable ones
(`kSmallBuffer`, `kRoundLarge`, `kLargeBuffer`)."""

DEFAULT_MULTIPROCESSORS = 108
"""Of an A100, for a GPU whose number is not known."""

GPUS_PER_NODE = 8
"""How many share a node, where nothing says it."""


@dataclass(frozen=True)
class Gpu:
    """One GPU model, with the vendor's figures.

    * `memory_bytes`: what the CUDA driver reports as total memory where a source gives it, else the nominal size.
    * `torch_name`: what torch calls it.
    * `bf16_tflops`: dense bf16 (and fp16) matrix arithmetic, `fp32_tflops` arithmetic in fp32, both in 1e12 FLOP/s; 0 where not known.
    * `hbm_gb_per_s`: memory bandwidth; `link_gb_per_s`, `host_gb_per_s`: the bidirectional bandwidth from GPU to GPU, and from GPU to host;
      1e9 byte/s, 0 where not known.
    * `multiprocessors`: streaming multiprocessors that are enabled; some kernels split their work by it.
    * `compute_capability`: CUDA's, e.g. (9, 0); it decides the size of PyTorch's cuBLAS workspace.
    """

    __pydantic_config__ = STRICT

    id: str
    name: str
    memory_bytes: int
    bf16_tflops: float
    hbm_gb_per_s: float
    link_gb_per_s: float
    compute_capability: tuple[int, int]
    source: str
    torch_name: str = ""
    fp32_tflops: float = 0.0
    host_gb_per_s: float = 0.0
    multiprocessors: int = DEFAULT_MULTIPROCESSORS

    @property
    def tf32_tflops(self) -> float:
        """Dense TF32 matrix arithmetic, 1e12 FLOP/s: tensor cores run it at half of bf16's rate (the datasheets named in `gpus.toml`)."""
        return self.bf16_tflops / 2

    def peak_flops(self, dtype: str) -> float | None:
        """The most operations per second of matrix products in a dtype; `None` where not known."""
        return 1e12 * (self.fp32_tflops if dtype == "fp32" else self.bf16_tflops) or None


@functools.cache
def all_gpus() -> dict[str, Gpu]:
    """Every GPU of the table by id."""
    table = shipped_table("gpus.toml")
    return {id_: Gpu(id=id_, **{**row, "compute_capability": tuple(row["compute_capability"])}) for id_, row in table.items()}


def find_gpu(id_: str) -> Gpu:
    """The GPU of that id. Raises `InputError` naming the known ones."""
    return named("GPU", id_, all_gpus())


def gpu_named(torch_name: str | None) -> Gpu | None:
    """The GPU that torch calls so; `None` for one that is not in the table."""
    return next((gpu for gpu in all_gpus().values() if torch_name and torch_name in (gpu.torch_name, gpu.id)), None)
