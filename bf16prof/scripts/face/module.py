"""What takes the place of functions in `torch.cuda`, `torch.accelerator` and around them: answers
of the GPU that is modelled."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bf16prof.scripts.face.callers import asked_from_inside

RNG_STATE_BYTES = 16
"""A CUDA generator's state: seed and offset (aten/src/ATen/cuda/CUDAGeneratorImpl.cpp)."""


class MemoryCounters(Protocol):
    """A GPU's memory as `torch.cuda` counts it; its peaks are the script's own to reset."""

    def allocated(self) -> int:
        """`memory_allocated`."""
        ...

    def peak(self) -> int:
        """`max_memory_allocated`."""
        ...

    def reserved(self) -> int:
        """`memory_reserved`."""
        ...

    def peak_reserved(self) -> int:
        """`max_memory_reserved`."""
        ...

    def reset_peaks(self) -> None:
        """`reset_peak_memory_stats`."""
        ...


class Accelerator(Protocol):
    """Streams, events and the cache of that GPU (DeepSpeed's interface)."""

    Stream: Any
    Event: Any

    def synchronize(self) -> None:
        """Wait for all streams."""
        ...

    def empty_cache(self) -> None:
        """Give back what is held for nobody."""
        ...

    def current_stream(self) -> Any:
        """The stream in use."""
        ...

    def default_stream(self) -> Any:
        """The stream in use where no other was chosen."""
        ...

    def stream(self, stream: Any) -> Any:
        """Work of this block is on that stream."""
        ...


@dataclass(frozen=True)
class ModelledGpu:
    """The GPU of this rank: the index and the number that the script sees, and what it is."""

    index: int
    count: int
    name: str
    total: int
    capability: tuple[int, int]
    processors: int
    memory: MemoryCounters
    accelerator: Any


Row = tuple[Any, str, Any]
"""Owner, attribute, and what is there instead."""


def replacements(gpu: ModelledGpu) -> Iterator[Row]:
    """All that is replaced."""
    for name, value in {**_device(gpu), **_memory(gpu), **_streams(gpu), **_random()}.items():
        yield torch.cuda, name, _named(name, value)
        if hasattr(torch.cuda.memory, name):
            yield torch.cuda.memory, name, _named(name, value)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        yield torch.cuda.nvtx, name, _named(name, _nothing)
    for name, value in _accelerator(gpu).items():
        yield torch.accelerator, name, _named(name, value)
    yield torch.version, "cuda", "12.8"
    yield torch.backends.cuda, "is_built", _named("is_built", lambda: not asked_from_inside())


def of_deepspeed(accelerator: Any, index: int) -> Iterator[Row]:
    """The names of the device that DeepSpeed's accelerator gives to a script; DeepSpeed itself goes
    by those of the one at home."""
    from deepspeed import DeepSpeedEngine

    cls = type(accelerator)
    real_name, real_current = cls.device_name, cls.current_device_name

    def device_name(self: Any, device_index: int | None = None) -> str:
        if asked_from_inside():
            return str(real_name(self, device_index))
        return "cuda" if device_index is None else f"cuda:{device_index}"

    yield cls, "device_name", device_name
    yield cls, "current_device_name", lambda self: real_current(self) if asked_from_inside() else f"cuda:{index}"
    yield cls, "current_device", lambda self: 0 if asked_from_inside() else index
    yield cls, "device_count", lambda self: 1 if asked_from_inside() else torch.cuda.device_count()
    yield cls, "is_available", lambda self: True
    yield cls, "communication_backend_name", lambda self: "nccl"

    def device(self: Any) -> Any:
        return self.__dict__["_home"] if asked_from_inside() else torch.device("cuda", index)

    def set_device(self: Any, value: Any) -> None:
        self.__dict__["_home"] = value

    yield DeepSpeedEngine, "device", property(device, set_device)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _named(name: str, value: Any) -> Any:
    """A function object of its own for every name: PyTorch's compiler takes no two names for
    one."""
    if not isinstance(value, types.FunctionType):
        return value
    copied = types.FunctionType(value.__code__, value.__globals__, name, value.__defaults__, value.__closure__)
    copied.__kwdefaults__ = value.__kwdefaults__
    return copied


def _device(gpu: ModelledGpu) -> dict[str, Any]:
    properties = types.SimpleNamespace(
        name=gpu.name, total_memory=gpu.total, major=gpu.capability[0], minor=gpu.capability[1],
        multi_processor_count=gpu.processors, warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block=49152, gcnArchName="", is_integrated=0, is_multi_gpu_board=0, L2_cache_size=50 << 20, uuid="GPU-0",
    )  # fmt: skip
    return {
        "is_available": lambda: not asked_from_inside(),
        "is_initialized": lambda: not asked_from_inside(),
        "device_count": lambda: 0 if asked_from_inside() else gpu.count,
        "current_device": lambda: gpu.index,
        "set_device": _nothing,
        "device": lambda *_: contextlib.nullcontext(),
        "device_of": lambda *_: contextlib.nullcontext(),
        "get_device_name": lambda *_, **__: gpu.name,
        "get_device_capability": lambda *_, **__: gpu.capability,
        "get_device_properties": lambda *_, **__: properties,
        "get_arch_list": lambda: [f"sm_{gpu.capability[0]}{gpu.capability[1]}"],
        "is_bf16_supported": lambda *_, **__: True,
        "is_tf32_supported": lambda *_, **__: True,
        "can_device_access_peer": lambda *_: True,
        "utilization": lambda *_, **__: 0,
        "temperature": lambda *_, **__: 0,
        "power_draw": lambda *_, **__: 0,
        "init": _nothing,
        "_lazy_init": _nothing,
        "ipc_collect": _nothing,
        "is_current_stream_capturing": lambda: False,
    }


def _memory(gpu: ModelledGpu) -> dict[str, Any]:
    memory = gpu.memory

    def stats(*_: Any, **__: Any) -> dict[str, Any]:
        sizes = {"allocated": (memory.allocated(), memory.peak()), "reserved": (memory.reserved(), memory.peak_reserved())}
        sizes |= {"active": sizes["allocated"], "requested": sizes["allocated"]}
        table = {
            f"{name}_bytes.{pool}.{when}": size if pool == "all" else 0
            for name, both in sizes.items()
            for pool in ("all", "small_pool", "large_pool")
            for when, size in zip(("current", "peak", "allocated", "freed"), (*both, 0, 0), strict=True)
        }
        return {**table, "num_alloc_retries": 0, "num_ooms": 0, "inactive_split_bytes.all.current": 0, "inactive_split_bytes.all.peak": 0}

    return {
        "memory_allocated": lambda *_, **__: memory.allocated(),
        "max_memory_allocated": lambda *_, **__: memory.peak(),
        "memory_reserved": lambda *_, **__: memory.reserved(),
        "max_memory_reserved": lambda *_, **__: memory.peak_reserved(),
        "memory_cached": lambda *_, **__: memory.reserved(),
        "max_memory_cached": lambda *_, **__: memory.peak_reserved(),
        "reset_peak_memory_stats": lambda *_, **__: memory.reset_peaks(),
        "reset_max_memory_allocated": lambda *_, **__: memory.reset_peaks(),
        "reset_max_memory_cached": lambda *_, **__: memory.reset_peaks(),
        "reset_accumulated_memory_stats": _nothing,
        "memory_stats": stats,
        "memory_summary": lambda *_, **__: f"allocated {memory.allocated()} bytes, peak {memory.peak()}, reserved {memory.reserved()}",
        "memory_snapshot": lambda *_, **__: [],
        "mem_get_info": lambda *_, **__: (gpu.total - memory.reserved(), gpu.total),
        "set_per_process_memory_fraction": _nothing,
        "empty_cache": gpu.accelerator.empty_cache,
        "_record_memory_history": _nothing,
        "_dump_snapshot": _nothing,
    }


def _streams(gpu: ModelledGpu) -> dict[str, Any]:
    accelerator = gpu.accelerator
    return {
        "Stream": accelerator.Stream,
        "Event": accelerator.Event,
        "synchronize": lambda *_, **__: accelerator.synchronize(),
        "current_stream": lambda *_, **__: accelerator.current_stream(),
        "default_stream": lambda *_, **__: accelerator.default_stream(),
        "stream": lambda stream: contextlib.nullcontext() if stream is None else accelerator.stream(stream),
        "set_stream": _nothing,
    }


def _random() -> dict[str, Any]:
    return {
        "manual_seed": _nothing,
        "manual_seed_all": _nothing,
        "seed": _nothing,
        "seed_all": _nothing,
        "initial_seed": lambda: 0,
        "get_rng_state": lambda *_, **__: torch.zeros(RNG_STATE_BYTES, dtype=torch.uint8),
        "set_rng_state": _nothing,
        "get_rng_state_all": lambda: [torch.zeros(RNG_STATE_BYTES, dtype=torch.uint8)],
        "set_rng_state_all": _nothing,
    }


def _accelerator(gpu: ModelledGpu) -> dict[str, Any]:
    """`torch.accelerator`, the same without the name of the vendor."""
    device = torch.device("cuda", gpu.index)
    found = {
        "is_available": lambda: not asked_from_inside(),
        "device_count": lambda: 0 if asked_from_inside() else gpu.count,
        "current_accelerator": lambda *_, **__: None if asked_from_inside() else device,
        "current_device_index": lambda: gpu.index,
        "current_device_idx": lambda: gpu.index,
        "set_device_index": _nothing,
        "set_device_idx": _nothing,
        "synchronize": lambda *_, **__: gpu.accelerator.synchronize(),
        "current_stream": lambda *_, **__: gpu.accelerator.current_stream(),
        "set_stream": _nothing,
    }
    shared = (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "reset_peak_memory_stats",
        "empty_cache",
    )
    found |= {name: value for name, value in _memory(gpu).items() if name in (*shared, "memory_stats")}
    return {name: value for name, value in found.items() if hasattr(torch.accelerator, name)}
