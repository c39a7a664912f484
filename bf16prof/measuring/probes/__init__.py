"""Memory probes behind one interface: what a rank's allocator says, on a GPU (`cuda`) or a CPU
(`cpu`); `nvml` sees the whole device."""

from __future__ import annotations

from typing import Protocol

from bf16prof.vocabulary import Device


class Probe(Protocol):
    """Reads one rank's memory. Bytes, all of them.

    `name` is the device in words, `device_type` is torch's word for it. Readings never allocate and
    never synchronise.
    """

    name: str
    device: Device
    device_type: str

    def allocated_bytes(self) -> int:
        """Bytes in live tensors now."""
        ...

    def take_phase_peak(self) -> int:
        """The highest of `allocated_bytes` since the last call; starts again from now."""
        ...

    def run_peak_bytes(self) -> int:
        """The highest of `allocated_bytes` since the probe was made, untouched by
        `take_phase_peak`."""
        ...

    def reserved_bytes(self) -> int | None:
        """The most that the caching allocator has held; `None` where there is none."""
        ...

    def retries(self) -> int | None:
        """How often the caching allocator had to give memory back and try again; `None` where there
        is none."""
        ...

    def free_workspaces(self) -> int:
        """Free the workspaces that libraries (cuBLAS) hold inside the allocator; the bytes that
        this gave back. Call it last."""
        ...

    def settle(self) -> None:
        """Wait until memory that is free in principle is counted as free. Never inside a timed
        step."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        ...


def make_probe(device: Device) -> Probe:
    """The probe of that device: the CUDA allocator's for a GPU, else the CPU's."""
    if device is Device.GPU:
        from bf16prof.measuring.probes.cuda import CudaProbe

        return CudaProbe()
    from bf16prof.measuring.probes.cpu import CpuProbe

    return CpuProbe()
