"""Probes of a process in which somebody else's script runs, which must not notice them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from bf16prof.measuring.probes import Probe
from bf16prof.vocabulary import Device

PEAKS = ("allocated_bytes.all.peak", "reserved_bytes.all.peak")
ALL_PEAKS = (*PEAKS, "active_bytes.all.peak", "requested_bytes.all.peak")
Stats = Callable[..., dict[str, Any]]


def is_in_use() -> bool:
    """Whether the script uses CUDA by now."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class GuestProbe:
    """Reads the caching allocator of the device that the script has chosen, and touches CUDA only
    when the script has.

    There is one peak counter, which is reset at every phase and by the script itself: each of both
    gets its own peak (`shown`).
    """

    device = Device.GPU
    device_type = "cuda"

    def __init__(self) -> None:
        self._stats: Stats = torch.cuda.memory.memory_stats
        self._reset: Callable[..., None] = torch.cuda.memory.reset_peak_memory_stats
        self.name = ""
        self._phase = self._run = self._run_reserved = 0
        self._scripts: dict[str, int] = {}

    def allocated_bytes(self) -> int:
        """Bytes in live blocks now."""
        return self._value("allocated_bytes.all.current")

    def take_phase_peak(self) -> int:
        """The highest since the last call; the script's own peak stays."""
        if not is_in_use():
            return 0
        self.name = self.name or torch.cuda.get_device_name()
        stats = self._stats()  # once: torch makes a dictionary of some hundred numbers
        self._fold(stats)
        for key in ALL_PEAKS:
            self._scripts[key] = max(self._scripts.get(key, 0), int(stats.get(key, 0)))
        self._reset()
        peak, self._phase = self._phase, 0
        return peak

    def run_peak_bytes(self) -> int:
        """The highest since the process began."""
        return max(self._run, self._value(PEAKS[0]))

    def reserved_bytes(self) -> int:
        """The most that the allocator has held."""
        return max(self._run_reserved, self._value(PEAKS[1]))

    def retries(self) -> int:
        """Allocations that succeeded only after the cache was freed."""
        return self._value("num_alloc_retries")

    def free_workspaces(self) -> int:
        """Free cuBLAS's workspaces; the bytes that this gave back. Only when the script is over."""
        before = self.allocated_bytes()
        if is_in_use():
            torch._C._cuda_clearCublasWorkspaces()
        return before - self.allocated_bytes()

    def settle(self) -> None:
        """The caching allocator counts a block as free as soon as its tensor is gone."""

    def synchronize(self) -> None:
        """Wait for the device, if there is one in use."""
        if is_in_use():
            torch.cuda.synchronize()

    def _fold(self, stats: Mapping[str, Any]) -> None:
        """Keep the peaks that are about to be reset."""
        allocated, reserved = (int(stats.get(key, 0)) for key in PEAKS)
        self._phase = max(self._phase, allocated)
        self._run = max(self._run, self._phase)
        self._run_reserved = max(self._run_reserved, reserved)

    def _value(self, key: str) -> int:
        return int(self._stats().get(key, 0)) if is_in_use() else 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Let the script see the peaks that it would see without this probe, and reset them. Of
        other devices it sees all."""

        def memory_stats(device: Any = None) -> dict[str, Any]:
            found = dict(self._stats(device))
            if self._is_own(device):
                for key, peak in self._scripts.items():
                    if key in found:
                        found[key] = max(found[key], peak)
            return found

        def reset_peak_memory_stats(device: Any = None) -> None:
            if self._is_own(device) and is_in_use():
                self._fold(self._stats())
                self._scripts.clear()
            self._reset(device)

        with contextlib.ExitStack() as stack:
            for owner in (torch.cuda, torch.cuda.memory):
                stack.enter_context(mock.patch.object(owner, "memory_stats", memory_stats))
                stack.enter_context(mock.patch.object(owner, "reset_peak_memory_stats", reset_peak_memory_stats))
            yield

    def _is_own(self, device: Any) -> bool:
        """Whether a device, as torch's functions take it, is the current one."""
        if device is None:
            return True
        index = device if isinstance(device, int) else torch.device(device).index
        return index is None or index == torch.cuda.current_device()


def make_guest_probe() -> tuple[Probe, contextlib.AbstractContextManager[None, bool | None]]:
    """The probe for this process, and a context in which the script sees what it would see
    without."""
    if torch.cuda.is_available():
        guest = GuestProbe()
        return guest, guest.shown()
    from bf16prof.measuring.probes.cpu import CpuProbe

    return CpuProbe(), contextlib.nullcontext(None)
