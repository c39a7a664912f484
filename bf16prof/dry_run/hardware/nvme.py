"""DeepSpeed's files on NVMe as far as they decide memory: page-locked buffers on the host. Nothing
is read or written."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

FOLDERS: Any = SimpleNamespace(path=os.path, environ=os.environ, makedirs=lambda *_, **__: None)
"""What DeepSpeed's swappers ask of `os`, without making folders."""

TREES: Any = SimpleNamespace(rmtree=lambda *_, **__: None)
"""What they ask of `shutil`, without removing any."""


LOCKED = "is_page_locked"
"""An attribute of the storages of page-locked tensors, which all handles know
(deepspeed_pin_tensor.cpp): it goes with the storage, whose address another one may have later."""


class FileHandle:
    """DeepSpeed's `aio_handle` (csrc/aio/py_lib): every read and write is over at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._done = 0

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """A page-locked tensor on the host, of as many bytes as are asked for."""
        made = torch.empty(count, dtype=like.dtype, device="cpu")
        setattr(made.untyped_storage(), LOCKED, True)
        return made

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Its memory goes with the tensor."""
        setattr(tensor.untyped_storage(), LOCKED, False)
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one that is page-locked."""
        return getattr(tensor.untyped_storage(), LOCKED, False)

    def async_pread(self, *_: Any) -> int:
        """Begin to read; 0 is no error."""
        self._done += 1
        return 0

    def async_pwrite(self, *_: Any) -> int:
        """Begin to write."""
        self._done += 1
        return 0

    def wait(self) -> int:
        """How many have been done since the last time."""
        done, self._done = self._done, 0
        return done


def buffers_note(optimizer: Any) -> list[str]:
    """How much host memory DeepSpeed has locked to swap an optimizer's states, in words; none where
    it swaps none."""
    buffers = getattr(getattr(optimizer, "optimizer_swapper", None), "swap_buffer_manager", None)
    if buffers is None:
        return []
    each = buffers.num_elems * buffers.dtype.itemsize
    return [
        f"NVMe: {buffers.count} page-locked buffers of {each:,} bytes on the host, as large as the largest sub-group; the rest in files"
    ]
