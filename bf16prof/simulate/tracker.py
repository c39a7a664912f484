"""Every storage that the dry run allocates: when it begins, when it ends, where it lives.

A dispatch mode looks at each operator's outputs and counts the storages it has not seen; a weak reference tells when one is gone. Fake
tensors own storages without memory, so sizes, sharing and lifetimes are those of the real thing.

The host is `cpu`; the simulated GPU is `cpu:0`. To PyTorch both are CPUs, so that autograd runs without a driver, yet they are different
devices: fake tensors refuse to mix them, and copies between them allocate, as between a host and a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.records import Device
from bf16prof.simulate.memo import Memo

DEVICE_OF = torch.ops.prim.device.default

CPU_SCRATCH: dict[Any, Callable[..., int]] = {
    # gloo's reduce-scatter works on a clone of its input (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp).
    torch.ops.c10d._reduce_scatter_base_.default: lambda output, source, *_: source.untyped_storage().nbytes(),
    # gloo's all-gather receives into a flat tensor of its own (AsyncAllgatherWork).
    torch.ops.c10d._allgather_base_.default: lambda output, *_: output.untyped_storage().nbytes(),
}
"""What kernels on the CPU allocate while they run, beyond their outputs, in bytes by operator."""

GPU = torch.device("cpu", 0)
HOST = torch.device("cpu")


@dataclass
class Memory:
    """Allocated bytes of one place: now, and the highest since `Tracker.take_phase_peak`."""

    current: int = 0
    phase_peak: int = 0

    def add(self, size: int) -> None:
        """Allocate."""
        self.current += size
        self.touch(0)

    def touch(self, size: int) -> None:
        """Allocate and free at once."""
        self.phase_peak = max(self.phase_peak, self.current + size)


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages on the device and on the host; speaks the language of a memory probe.

    For a GPU, sizes are rounded up as its caching allocator does. Ranks on CPU have one memory: everything is on the device.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.host = Memory(), Memory()
        self._gpu = device is Device.GPU
        self._scratch = {} if self._gpu else CPU_SCRATCH
        self._live: dict[int, weakref.ref[Any]] = {}
        self._memo = Memo()
        self._works: dict[Any, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and look at what it gave."""
        if func is DEVICE_OF:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return scalar_answer(args[0])
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs or {})
        question = self._memo.question(func, args, kwargs or {})
        if question is not None and (known := self._memo.recall(question)):
            out, fresh = known
            for tensor in fresh:
                self.see(tensor)
            return out
        for each in args:
            if isinstance(each, Tensor) and not isinstance(each, FakeTensor):
                self.see(each)  # a Python number that autograd keeps as a tensor
        out = func(*args, **(kwargs or {}))
        if question is not None:
            self._memo.learn(question, out)
        if scratch := self._scratch.get(func):
            self.device.touch(scratch(*args))
        if isinstance(out, Tensor):
            self.see(out)
        elif isinstance(out, tuple | list):
            for each in out:
                if isinstance(each, Tensor):
                    self.see(each)
        return out

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A collective of the fake process group: it moves nothing, gives its first argument back, and its work is done at once."""
        if scratch := self._scratch.get(func):
            self.device.touch(scratch(*args))
        if func in self._works:
            return args[0], self._works[func]
        out = func(*args, **kwargs)
        if isinstance(out, tuple) and _same(out[0], args[0]):
            self._works[func] = out[1]
        return out

    def see(self, tensor: Tensor) -> None:
        """Count the tensor's storage, unless it is known or has no memory (`meta`)."""
        device = tensor.device
        if device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        if self._gpu and device == GPU:
            size = -(-size // ALLOCATOR_BLOCK_BYTES) * ALLOCATOR_BLOCK_BYTES
        memory = self.device if not self._gpu or device == GPU else self.host
        memory.add(size)
        self._live[key] = weakref.ref(storage, self._end(key, memory, size))

    def _end(self, key: int, memory: Memory, size: int) -> Callable[[Any], None]:
        live = self._live

        def gone(_: Any) -> None:
            memory.current -= size
            live.pop(key, None)

        return gone

    def allocated_bytes(self) -> int:
        """Bytes in live tensors on the device now."""
        return self.device.current

    def take_phase_peak(self) -> int:
        """The highest since the last call; starts again from now."""
        peak, self.device.phase_peak = self.device.phase_peak, self.device.current
        return peak


def _same(out: Any, given: Any) -> bool:
    return out is given or (isinstance(out, list) and len(out) == len(given) and all(a is b for a, b in zip(out, given, strict=True)))


def scalar_answer(tensor: Tensor) -> float | int | bool:
    """What `.item()` gives where there are no values: no overflow, a gradient norm of 1."""
    if tensor.dtype is torch.bool:
        return False
    return 1.0 if tensor.dtype.is_floating_point else 0
