"""The table of GPUs: memory, arithmetic, memory bandwidth and links, each with its source
(`gpus.toml`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bf16prof.errors import InputError
from bf16prof.profiles.names import matches, named
from bf16prof.profiles.shipped import shipped_table
from bf16prof.vocabulary import STRICT

ALLOCATOR_BLOCK_BYTES = 512
"""`kMinBlockSize` of PyTorch's CUDA caching allocator: every block is a multiple of it
(c10/cuda/CUDACachingAllocator.h)."""

ALLOCATOR_SEGMENT_BYTES = 2 << 20
"""What the size of every segment is a multiple of: of the small pool's, of the large pool's, and of
the pages of expandable ones (`kSmallBuffer`, `kRoundLarge`, `kLargeBuffer`)."""

DEFAULT_MULTIPROCESSORS = 108
"""Of an A100, for a GPU whose number is not known."""

GPUS_PER_NODE = 8
"""How many share a node, where nothing says it."""

FIRST_WITH_BF16 = (8, 0)
"""The first compute capability with tensor cores for bf16 and TF32, and with PyTorch's flash
attention."""

ASSUMED_CAPABILITY = (8, 0)
"""The compute capability of a GPU of which only the memory is known."""

UNITS = {"g": 2**30, "gi": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mi": 2**20, "mib": 2**20, "mb": 10**6}
"""Bytes in a unit of memory, as people write it. GB and MB are powers of ten, as everywhere
here."""

WRITTEN_UNITS = {2**30: "GiB", 10**9: "GB", 2**20: "MiB", 10**6: "MB"}

LARGEST_BYTES = 2**44


def has_small_shared_memory(capability: tuple[int, int]) -> bool:
    """Whether flash attention's backward has too little of it for wide heads
    (transformers/cuda/sdp_utils.cpp,
    check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120)."""
    return (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)


@dataclass(frozen=True)
class Gpu:
    """One GPU model, with the vendor's figures.

    * `memory_bytes`: what the CUDA driver reports as total memory where a source gives it, else the
      nominal size.
    * `torch_name`: what torch calls it; `aliases`: further names of it.
    * `bf16_tflops`: dense bf16 (and fp16) matrix arithmetic, `fp32_tflops` arithmetic in fp32,
      `fp16_tflops` that in fp16 where it is not bf16's; in 1e12 FLOP/s, 0 where not known.
    * `hbm_gb_per_s`: memory bandwidth; `link_gb_per_s`, `host_gb_per_s`: the bidirectional
      bandwidth from GPU to GPU, and from GPU to host; 1e9 byte/s, 0 where not known.
    * `compute_capability`: CUDA's, e.g. (9, 0); it decides which kernels run, and the size of
      PyTorch's cuBLAS workspace. Of a GPU that has none (AMD's), that of the GPU whose kernels are
      taken in the place of its own.
    * `multiprocessors`: streaming multiprocessors, of an AMD GPU compute units; 0 where not known.
    * `architecture`: of an AMD GPU, as torch calls it (`gfx942`); empty for NVIDIA's.
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
    multiprocessors: int = 0
    fp16_tflops: float = 0.0
    architecture: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def tf32_tflops(self) -> float:
        """Dense TF32 matrix arithmetic, 1e12 FLOP/s: tensor cores run it at half of bf16's rate
        (the datasheets named in `gpus.toml`). Where nothing runs it, fp32's."""
        has_tf32 = self.compute_capability >= FIRST_WITH_BF16 and not self.architecture
        return self.bf16_tflops / 2 if has_tf32 else self.fp32_tflops

    @property
    def is_known_by_size_only(self) -> bool:
        """Whether only its memory is known, because the user named no more (`--gpu 80GiB`)."""
        return not self.torch_name and not self.bf16_tflops

    def peak_flops(self, dtype: str) -> float | None:
        """The most operations per second of matrix products in a dtype; `None` where not known."""
        half = self.fp16_tflops if dtype == "fp16" and self.fp16_tflops else self.bf16_tflops
        return 1e12 * (self.fp32_tflops if dtype == "fp32" else half) or None

    def caveats(self) -> Iterator[str]:
        """What a prediction for this GPU takes from another one, and which of its numbers that
        touches."""
        capability = "compute capability {}.{}".format(*self.compute_capability)
        if self.is_known_by_size_only:
            yield (
                f"GPU {self.id}: only its memory is known, {self.memory_bytes:,} bytes. Assumed: the kernels and workspaces of "
                f"{capability} (activations, peaks); its speed is not known, so there is no floor of the step time"
            )
        elif self.architecture:
            yield (
                f"GPU {self.id}: ROCm's kernels are not modelled. Activations, peaks, reserved and device memory are those of CUDA's "
                f"kernels of {capability}, and hipBLASLt's own workspace (76 MiB) is not in; parameters, gradients, optimizer states and "
                "DeepSpeed's buffers do not depend on it"
            )
        elif self.compute_capability < FIRST_WITH_BF16:
            yield (
                f"GPU {self.id}: {capability} has no bf16 tensor cores and no flash attention. bf16 is multiplied in fp32 (floor of the "
                "step time). Attention in bf16, or with heads that share keys, keeps whole score matrices (activations, peaks); else it "
                "runs the memory-efficient kernel. Scratch memory of kernels (peak in backward) is that of compute capability 8.0"
            )


@functools.cache
def all_gpus() -> dict[str, Gpu]:
    """Every GPU of the table by id."""
    return {id_: _gpu(id_, row) for id_, row in shipped_table("gpus.toml").items()}


def _gpu(id_: str, row: dict[str, Any]) -> Gpu:
    tuples: dict[str, Any] = {key: tuple(row[key]) for key in ("compute_capability", "aliases") if key in row}
    return Gpu(id=id_, **{**row, **tuples})


def find_gpu(name: str) -> Gpu:
    """The GPU that somebody calls so: by id, by torch's or another of its names, or by a part of
    them that only one has; or any GPU with so much memory (`80GiB`). Raises `InputError` naming
    those that are near."""
    return _of_size(name) or named("GPU", name, all_gpus(), _names, partly=True, more="or its memory, as 80GiB")


def gpu_named(name: str | None) -> Gpu | None:
    """The GPU that torch calls so, or that has this id; `None` for one that is not in the table."""
    if not name:
        return None
    found = matches(name, {id_: (id_, *_names(gpu)) for id_, gpu in all_gpus().items()})
    return all_gpus()[found[0]] if len(found) == 1 else _of_size(name)


def _names(gpu: Gpu) -> tuple[str, ...]:
    return (gpu.name, gpu.torch_name, *gpu.aliases)


def _of_size(name: str) -> Gpu | None:
    """A GPU of which only the memory is known; `None` where the name is no size. Raises
    `InputError` for one that no GPU has."""
    size = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([gm](?:i?b?))\s*", name, re.IGNORECASE)
    if size is None:
        return None
    unit = UNITS[size[2].casefold()]
    memory = int(float(size[1]) * unit)
    if not 2**28 <= memory <= LARGEST_BYTES:
        raise InputError(
            f"GPU {name!r}: no GPU has so much memory, or so little", hint="as 80GiB (2**30 bytes each), 80GB (10**9) or 24g (GiB)"
        )
    written = f"{float(size[1]):g}{WRITTEN_UNITS[unit]}"
    return Gpu(written, f"a GPU of {written}", memory, 0.0, 0.0, 0.0, ASSUMED_CAPABILITY, "the size of its memory, as the user gave it")
