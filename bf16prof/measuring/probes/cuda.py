"""Memory of a rank on its GPU, as PyTorch's caching allocator counts it
(`torch.cuda.memory_stats`)."""

from __future__ import annotations

import torch

from bf16prof.vocabulary import Device


class CudaProbe:
    """Reads the allocator of the current CUDA device.

    Phase peaks come from resetting the allocator's peak counter at every mark; the peak of the
    whole run is the highest of them.
    """

    device = Device.GPU
    device_type = "cuda"

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self._run_peak = self._run_reserved = 0
        torch.cuda.reset_peak_memory_stats()

    def allocated_bytes(self) -> int:
        """`torch.cuda.memory_allocated`: bytes in live blocks, each rounded up to 512."""
        return torch.cuda.memory_allocated()

    def take_phase_peak(self) -> int:
        """`torch.cuda.max_memory_allocated` since the last call, then reset."""
        peak = torch.cuda.max_memory_allocated()
        self._run_peak = max(self._run_peak, peak)
        self._run_reserved = self.reserved_bytes()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def run_peak_bytes(self) -> int:
        """The highest since the probe was made."""
        return max(self._run_peak, torch.cuda.max_memory_allocated())

    def reserved_bytes(self) -> int:
        """`torch.cuda.max_memory_reserved` since the probe was made: DeepSpeed empties the cache
        while it builds an engine."""
        return max(self._run_reserved, torch.cuda.max_memory_reserved())

    def retries(self) -> int:
        """`num_alloc_retries`: allocations that failed first, then succeeded after the cache was
        freed."""
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))

    def free_workspaces(self) -> int:
        """Free cuBLAS's workspaces, one per thread that has run a matrix product; the bytes that
        this gave back."""
        before = torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()
        return before - torch.cuda.memory_allocated()

    def settle(self) -> None:
        """The caching allocator counts a block as free as soon as its tensor is gone."""

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()
