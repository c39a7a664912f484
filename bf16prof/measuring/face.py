"""A CPU rank as a GPU's, for libraries that ask for CUDA devices by name."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from bf16prof.measuring.probes import Probe
from bf16prof.scripts.face.worn import cpu_as_gpu, worn


class ProbeMemory:
    """A rank's memory as `torch.cuda` would count it. The CPU's allocator keeps nothing back, and
    the probe's peaks are not reset."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def allocated(self) -> int:
        """`memory_allocated`."""
        return self._probe.allocated_bytes()

    def peak(self) -> int:
        """`max_memory_allocated`."""
        return self._probe.run_peak_bytes()

    reserved, peak_reserved = allocated, peak

    def reset_peaks(self) -> None:
        """`reset_peak_memory_stats`."""


def cpu_worn_as_gpu(probe: Probe) -> AbstractContextManager[None]:
    """Inside, CUDA devices are the CPU. Each rank has one."""
    return worn(cpu_as_gpu(0, 1, ProbeMemory(probe)), torch.device("cpu"))
