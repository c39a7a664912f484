"""The random numbers that `torch.randn` gives on a CUDA device, computed without one: what a
benchmark with a fixed seed routes where.

Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller as curand has them (`curand_init`,
`curand_normal4`); which thread makes which element, and how far a call moves the generator:
aten/src/ATen/native/cuda/DistributionTemplates.h (`calc_execution_policy`,
`distribution_elementwise_grid_stride_kernel`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BLOCK, UNROLL = 256, 4
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)


class Generator:
    """A CUDA generator after `torch.manual_seed(seed)`, on a GPU with so many multiprocessors of so
    many threads."""

    def __init__(self, seed: int, multiprocessors: int, threads: int = 2048) -> None:
        self._seed, self._most = seed, multiprocessors * (threads // BLOCK)
        self._offset = 0

    def skip(self, elements: int) -> None:
        """A call that makes so many elements which nobody looks at."""
        self._offset += self._calls(elements) * UNROLL

    def normal(self, elements: int) -> Any:
        """Normal numbers in fp32, as `torch.randn(elements)` gives them."""
        threads = self._threads(elements)
        parts = []
        for call in range(self._calls(elements)):
            words = _philox(self._seed, np.arange(threads, dtype=np.uint64), self._offset // UNROLL + call)
            parts += [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
        self.skip(elements)
        return np.concatenate(parts)[:elements]

    def _threads(self, elements: int) -> int:
        return min(self._most, math.ceil(elements / BLOCK)) * BLOCK

    def _calls(self, elements: int) -> int:
        return (elements - 1) // (self._threads(elements) * UNROLL) + 1


def _philox(seed: int, thread: Any, counter: int) -> list[Any]:
    """The four words of each thread at that place of its sequence."""
    low, high = np.uint64(counter & 0xFFFFFFFF), np.uint64(counter >> 32)
    c = [np.full_like(thread, low), np.full_like(thread, high), thread & LOW, thread >> np.uint64(32)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(ROUNDS):
        first, second = c[0] * np.uint64(MULTIPLIERS[0]), c[2] * np.uint64(MULTIPLIERS[1])
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            second & LOW,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            first & LOW,
        ]
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, WEYL, strict=True)]
    return c


def _box_muller(x: Any, y: Any) -> tuple[Any, Any]:
    """Two normal numbers. Logarithm, sine and cosine are rounded from fp64: numpy's in fp32 differ
    from CPU to CPU in the last bit, which decides where two scores are as near as that.
    """
    unit = 2.0**-32
    u = x.astype(np.float32) * np.float32(unit) + np.float32(unit / 2)
    v = (y.astype(np.float32) * np.float32(unit * 2 * math.pi) + np.float32(unit * math.pi)).astype(np.float64)
    radius = np.sqrt(np.float32(-2) * np.log(u.astype(np.float64)).astype(np.float32))
    return radius * np.sin(v).astype(np.float32), radius * np.cos(v).astype(np.float32)
