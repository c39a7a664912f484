"""What else knows CUDA: default devices, generators, autocast, and the tensors that stand for a
GPU's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _device

from bf16prof.scripts.face.callers import asked_from_inside
from bf16prof.scripts.face.mode import is_cuda, is_index, means
from bf16prof.scripts.face.module import Row


def replacements(home: torch.device) -> Iterator[Row]:
    """All that is replaced. Autocast on the device that stands for the GPU is the CPU's to
    PyTorch."""
    real_context = _device.DeviceContext.__init__

    def context(self: Any, device: Any) -> None:
        real_context(self, home if means(home, device) else device)

    yield _device.DeviceContext, "__init__", context
    yield torch, "Generator", _generator()
    yield from _made_of_values(home)
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        yield torch, name, _of_the_cpu(getattr(torch, name), name)
    real_dtype, real_set = torch.get_autocast_dtype, torch.set_autocast_dtype
    yield torch, "get_autocast_gpu_dtype", lambda: real_dtype("cpu")
    yield torch, "set_autocast_gpu_dtype", lambda dtype: real_set("cpu", dtype)
    yield torch.amp, "is_autocast_available", lambda _: True
    autocast = cpu_autocast()
    for owner in (torch, torch.amp, torch.cuda.amp):
        yield owner, "autocast", autocast


def _made_of_values(home: torch.device) -> Iterator[Row]:
    """What makes tensors of Python's values, of which a mode does not see everything."""
    real_tensor = torch.tensor

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Any:
        return real_tensor(data, device=home if means(home, device) or is_index(device) else device, **kwargs)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
        if isinstance(data, torch.Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        if device is None:
            return real_as_tensor(data, dtype=dtype)
        return tensor(data, dtype=dtype, device=device)

    real_as_tensor = torch.as_tensor
    yield torch, "tensor", tensor
    if partitioning := sys.modules.get("deepspeed.runtime.zero.partition_parameters"):
        yield partitioning, "_orig_torch_tensor", tensor  # which `zero.Init` leaves behind as torch's
    yield torch, "as_tensor", as_tensor
    for name, dtype in LEGACY.items():
        yield torch.cuda, name, _legacy(tensor, home, dtype)


LEGACY = {
    "BFloat16Tensor": torch.bfloat16, "BoolTensor": torch.bool, "ByteTensor": torch.uint8, "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32, "HalfTensor": torch.float16, "IntTensor": torch.int32, "LongTensor": torch.int64,
}  # fmt: skip
"""`torch.cuda.FloatTensor` and its kin."""


def _legacy(tensor: Any, home: torch.device, dtype: torch.dtype) -> Any:
    def make(*data: Any) -> Any:
        if all(isinstance(each, int) for each in data):
            return torch.empty(data, dtype=dtype, device=home)
        return tensor(data[0], dtype=dtype, device=home)

    return make


def _generator() -> type:
    """`torch.Generator`, whose CUDA ones are the CPU's: nothing of theirs has a value."""

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return torch._C.Generator.__new__(cls, "cpu" if is_cuda(device) else device)  # type: ignore[call-arg]

    return Generator


def _of_the_cpu(real: Any, name: str) -> Any:
    def call(*args: Any) -> Any:
        if name == "is_autocast_enabled" and not args:
            return real("cpu")
        if name == "set_autocast_enabled" and len(args) == 1:
            return real("cpu", *args)
        return real("cpu" if is_cuda(args[0]) else args[0], *args[1:])

    return call


def tensors(cls: Any, home: torch.device, index: int) -> Iterator[Row]:
    """What tensors of a class say of their device: those on `home` are the GPU's to the script, and
    at home to PyTorch and DeepSpeed."""
    real = cls.device
    cuda = torch.device("cuda", index)

    def device(self: Any) -> torch.device:
        found: torch.device = real.__get__(self)
        return cuda if found == home and not asked_from_inside() else found

    def set_device(self: Any, value: torch.device) -> None:
        real.__set__(self, value)

    yield cls, "device", property(device, set_device)
    yield cls, "is_cuda", property(lambda self: real.__get__(self) == home and not asked_from_inside())
    yield cls, "get_device", lambda self: index if real.__get__(self) == home else -1


def cpu_autocast() -> Any:
    """`torch.autocast` for the CPU, which every simulated device is to PyTorch, under whichever
    name it is asked for."""
    real = torch.autocast

    class Autocast(real):  # type: ignore[misc, valid-type]
        def __init__(self, device_type_: str = "", *args: Any, **kwargs: Any) -> None:
            kwargs.pop("device_type", None)
            super().__init__("cpu", *args, **kwargs)

    return Autocast
