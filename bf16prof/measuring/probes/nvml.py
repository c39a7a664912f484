"""What the driver sees: process and device memory, utilisation and power, sampled through NVML
while a job runs.

PyTorch's counters end at its allocator; the CUDA context, NCCL and library workspaces are only
visible here. NVML has no peak counter, so the peak is the highest *sample*: an allocation shorter
than the interval can be missed. A machine without NVML is normal: the sampler then does nothing,
`summary()` is None and `reason` says why. What one GPU cannot tell (MIG, vGPU, unified memory) is
None.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

JOIN_TIMEOUT_S = 5.0
"""How long to wait for a sample under way when sampling ends; a wedged driver must not hold up the
job."""


@dataclass(frozen=True)
class NvmlSummary:
    """What was sampled. `peak_process_bytes` is None when NVML does not list this process, as in a
    container with its own process ids.

    * `peak_device_bytes`: used on the device by everybody, without what the driver reserves for
      itself.
    * `mean_utilisation`: share of the time in which a kernel ran, 0 to 1.
    * `mean_power_w`: watts of the whole device.
    """

    device_name: str
    total_bytes: int | None
    peak_process_bytes: int | None
    peak_device_bytes: int | None
    mean_utilisation: float | None
    mean_power_w: float | None
    samples: int

    def of_a_result(self) -> dict[str, Any]:
        """The same as fields of a rank's result (`RankResult`)."""
        return {"device_bytes": self.peak_process_bytes, "gpu_utilisation": self.mean_utilisation, "power_w": self.mean_power_w}


@dataclass(frozen=True)
class NvmlGpu:
    """One GPU of this machine in NVML's order (PCI bus order, which need not be CUDA's)."""

    index: int
    name: str
    uuid: str
    total_bytes: int | None


def available() -> str | None:
    """Why NVML cannot be used here, in one line; None if it can. Never raises: no driver and no GPU
    are normal."""
    import pynvml

    try:
        with _session() as nvml:
            return None if nvml.nvmlDeviceGetCount() else "NVML finds no GPU"
    except pynvml.NVMLError as error:
        return _reason(error)


def list_gpus() -> tuple[NvmlGpu, ...]:
    """The GPUs that NVML sees, CUDA_VISIBLE_DEVICES notwithstanding; empty where NVML cannot be
    used."""
    import pynvml

    try:
        with _session() as nvml:
            return tuple(_describe(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()


def driver_version() -> str | None:
    """The NVIDIA driver's version, e.g. `570.86.10`; None where NVML cannot be used."""
    import pynvml

    try:
        with _session() as nvml:
            return str(nvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def cuda_uuid(cuda_index: int) -> str:
    """The UUID of a CUDA device as torch numbers them, for `NvmlSampler`. It holds under any
    CUDA_VISIBLE_DEVICES and for MIG slices."""
    import torch

    return str(torch.cuda.get_device_properties(cuda_index).uuid)


class NvmlSampler:
    """Samples one GPU in a daemon thread, between `with` and its end.

    `device` is a UUID (`GPU-...`, `MIG-...`, or as torch prints it, without the prefix), a PCI bus
    id (`00000000:0F:00.0`), or NVML's index. A CUDA index is none of these: CUDA_VISIBLE_DEVICES
    renumbers, and CUDA sorts by speed; use `cuda_uuid`.
    """

    def __init__(self, device: int | str, interval_s: float = 0.05) -> None:
        self.reason: str | None = None
        self._device = device
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._session = contextlib.ExitStack()
        self._thread: threading.Thread | None = None
        self._series = {name: _Series() for name in ("process", "used", "utilisation", "power")}

    def __enter__(self) -> Self:
        import pynvml

        try:
            self._nvml = self._session.enter_context(_session())
            self._handle = _handle(self._nvml, self._device)
            self._name = str(self._nvml.nvmlDeviceGetName(self._handle))
        except pynvml.NVMLError as error:
            self.reason = _reason(error)
            self._session.close()
            return self
        self._total = self._ask(lambda: _memory(self._nvml, self._handle).total)
        self._thread = threading.Thread(target=self._run, name="bf16prof-nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            self._sample()
            self._session.close()

    @property
    def samples(self) -> int:
        """How many samples were taken so far."""
        return self._series["used"].asked

    def summary(self) -> NvmlSummary | None:
        """Peaks and means of the samples so far; None if NVML could not be used (`reason` says
        why)."""
        if self._thread is None:
            return None
        utilisation, power = self._series["utilisation"].mean, self._series["power"].mean
        return NvmlSummary(
            device_name=self._name,
            total_bytes=self._total,
            peak_process_bytes=self._series["process"].peak,
            peak_device_bytes=self._series["used"].peak,
            mean_utilisation=None if utilisation is None else utilisation / 100,
            mean_power_w=None if power is None else power / 1000,
            samples=self.samples,
        )

    def _run(self) -> None:
        self._sample()
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        nvml, handle = self._nvml, self._handle
        self._series["process"].add(self._ask(lambda: _process_bytes(nvml, handle)))
        self._series["utilisation"].add(self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        self._series["power"].add(self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle)))
        self._series["used"].add(self._ask(lambda: _memory(nvml, handle).used))

    def _ask(self, question: Callable[[], int | None]) -> int | None:
        try:
            return question()
        except self._nvml.NVMLError:
            return None


@dataclass
class _Series:
    """The answers to one question, folded as they come, so that a long job costs no memory."""

    asked: int = 0
    _values: int = field(default=0, init=False)
    _sum: int = field(default=0, init=False)
    peak: int | None = None

    def add(self, value: int | None) -> None:
        self.asked += 1
        if value is not None:
            self._values += 1
            self._sum += value
            self.peak = value if self.peak is None else max(self.peak, value)

    @property
    def mean(self) -> float | None:
        return self._sum / self._values if self._values else None


@contextlib.contextmanager
def _session() -> Iterator[Any]:
    """The `pynvml` module, initialised; shut down at the end whatever happens. Raises
    `pynvml.NVMLError` where there is no driver."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _reason(error: Exception) -> str:
    import pynvml

    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "libnvidia-ml.so.1 not found: no NVIDIA driver on this machine"
    return f"NVML: {error}"


def _handle(nvml: Any, device: int | str) -> Any:
    if isinstance(device, int):
        return nvml.nvmlDeviceGetHandleByIndex(device)
    if ":" in device:
        return nvml.nvmlDeviceGetHandleByPciBusId(device)
    if device.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(device)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{device}")
    except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{device}")


def _memory(nvml: Any, handle: Any) -> Any:
    """Memory with `total` and `used` bytes. Version 2, as `nvidia-smi` shows it, leaves the
    driver's own share out of `used`."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NotSupported):
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _process_bytes(nvml: Any, handle: Any) -> int | None:
    mine = [process.usedGpuMemory for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if process.pid == os.getpid()]
    known = [int(used) for used in mine if used is not None]
    return sum(known) if known else None


def _describe(nvml: Any, index: int) -> NvmlGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        total: int | None = _memory(nvml, handle).total
    except nvml.NVMLError:
        total = None
    return NvmlGpu(index, str(nvml.nvmlDeviceGetName(handle)), str(nvml.nvmlDeviceGetUUID(handle)), total)
