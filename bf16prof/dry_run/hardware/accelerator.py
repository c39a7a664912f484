"""The accelerator that DeepSpeed is told it runs on: a GPU as far as its decisions go (streams,
overlap, prefetch, pinned host memory, the memory that is left), a second CPU device as far as
PyTorch goes (`tracker.GPU`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from bf16prof.dry_run.hardware.nvme import FileHandle
from bf16prof.dry_run.tracker import GPU, HOST, Tracker
from bf16prof.engine.config import SHARED_MEMORY_BUILDER
from bf16prof.scripts.face.streams import GpuEvent, GpuStream


class StubOperators:
    """DeepSpeed's compiled operators read memory that fake tensors do not have. The optimizers'
    work in place and allocate nothing."""

    aio_handle = FileHandle

    @staticmethod
    def quantize(tensor: torch.Tensor, groups: int, bits: int, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """ZeRO++'s quantized weights and their scales (csrc/quantization/pt_binding.cpp,
        `quantize`)."""
        shape = (*tensor.shape[:-1], tensor.shape[-1] * bits // 8)
        scales = torch.empty((groups, 1), dtype=torch.float32, device=tensor.device)
        return torch.empty(shape, dtype=torch.int8, device=tensor.device), scales

    @staticmethod
    def dequantize(tensor: torch.Tensor, scales: torch.Tensor, groups: int, bits: int, _: Any) -> torch.Tensor:
        """The weights again, in fp16 (`dequantize`)."""
        shape = (*tensor.shape[:-1], tensor.shape[-1] * 8 // bits)
        return torch.empty(shape, dtype=torch.float16, device=tensor.device)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class StubBuilder:
    """Builds `StubOperators` in place of compiled ones."""

    NAME = name = "bf16prof_stub"

    def load(self, *_: Any, **__: Any) -> StubOperators:
        """The operators."""
        return StubOperators()

    def is_compatible(self, *_: Any, **__: Any) -> bool:
        """They always are."""
        return True


class _Simulated(CPU_Accelerator):  # type: ignore[misc]
    """What both simulated devices share: operators that are not compiled."""

    def create_op_builder(self, class_name: str) -> StubBuilder | None:
        """A builder of operators that do nothing; none for the shared-memory collectives, without
        which DeepSpeed asks PyTorch's."""
        return None if class_name == SHARED_MEMORY_BUILDER else StubBuilder()

    def device_count(self) -> int:
        """One: this rank's own. (DeepSpeed's CPU accelerator starts a process to count NUMA nodes,
        at every call.)"""
        return 1

    def get_op_builder(self, class_name: str) -> type[StubBuilder]:
        """The class of that builder."""
        return StubBuilder


class SimulatedCpu(_Simulated):
    """A gloo rank on CPU, as `measure` runs it where there is no GPU."""


class SimulatedGpu(_Simulated):
    """A GPU of a given size. What DeepSpeed's CUDA accelerator asks of the driver is answered from
    the tracker."""

    def __init__(self, tracker: Tracker, memory_bytes: int) -> None:
        super().__init__()
        self._name = str(GPU)
        self._tracker = tracker
        self._memory_bytes = memory_bytes
        self._default = self._current = GpuStream(number=0)

    def is_synchronized_device(self) -> bool:
        """GPUs run behind the host."""
        return False

    def device_name(self, device_index: int | None = None) -> str:
        """The simulated GPU, whichever index is asked for."""
        return str(GPU)

    def device(self, device_index: int | None = None) -> torch.device:
        """The simulated GPU."""
        return GPU

    def current_device(self) -> int:
        """Its index."""
        return 0

    def current_device_name(self) -> str:
        """Its name."""
        return str(GPU)

    def is_fp16_supported(self) -> bool:
        """GPUs with bf16 have fp16 as well."""
        return True

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the simulated GPU."""
        return tensor.device == GPU

    @property
    def Stream(self) -> type[GpuStream]:
        """The class of streams."""
        return GpuStream

    @contextlib.contextmanager
    def stream(self, stream: GpuStream) -> Iterator[None]:
        """Work of this block is on that stream, and what it allocates belongs to it."""
        before = self._current
        self._use(stream)
        try:
            yield
        finally:
            self._use(before)

    def _use(self, stream: GpuStream) -> None:
        self._current = stream
        self._tracker.ledger.stream = stream.number

    def current_stream(self, device_index: int | None = None) -> GpuStream:
        """The stream in use."""
        return self._current

    def default_stream(self, device_index: int | None = None) -> GpuStream:
        """The stream that is in use where no other was chosen."""
        return self._default

    @property
    def Event(self) -> type[GpuEvent]:
        """The class of events."""
        return GpuEvent

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes in live tensors."""
        return self._tracker.ledger.allocated_bytes()

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Bytes that the caching allocator holds."""
        return self._tracker.ledger.reserved_bytes()

    max_memory_allocated = memory_allocated
    max_memory_reserved = memory_cached = max_memory_cached = memory_reserved

    def empty_cache(self) -> None:
        """Give back what the caching allocator holds for nobody."""
        self._tracker.ledger.empty_cache()

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for all streams."""
        self._tracker.ledger.synchronize()

    def total_memory(self, device_index: int | None = None) -> int:
        """The GPU's memory."""
        return self._memory_bytes

    def available_memory(self, device_index: int | None = None) -> int:
        """What is left of it."""
        return self._memory_bytes - self._tracker.ledger.allocated_bytes()

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> torch.Tensor:
        """Pinned memory is a new allocation on the host."""
        return torch.empty_like(tensor, device=HOST)

    _torch_pin_memory = pin_memory


def _legacy(dtype: torch.dtype) -> property:
    """`torch.cuda.FloatTensor` and its kin: tensors on the GPU from values."""
    return property(lambda self: lambda data: torch.tensor(data, dtype=dtype, device=GPU))


for _name, _dtype in {
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}.items():
    setattr(SimulatedGpu, _name, _legacy(_dtype))
