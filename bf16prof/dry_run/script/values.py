"""What tensors without values answer where a script wants numbers, and where it prints them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from bf16prof.dry_run.script import known
from bf16prof.dry_run.script.invented import Invented
from bf16prof.dry_run.tracker import scalar_answer
from bf16prof.scripts.face.module import Row

NUMPY = {torch.bfloat16: "float32", torch.bool: "bool"}
"""NumPy's names of the dtypes that are called otherwise there, or for which it has none."""


def replacements(invented: Invented) -> Iterator[Row]:
    """All that is replaced in fake tensors."""

    def array(self: FakeTensor) -> Any:
        if (real := known.value(self)) is not None:
            return real.float().numpy() if real.dtype is torch.bfloat16 else real.numpy()
        invented.note("the values of a tensor without any were read: 0.5, 0 or False each", 2)
        name = NUMPY.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return np.full(tuple(self.shape), scalar_answer(self), dtype=name)

    def as_array(self: FakeTensor, dtype: Any = None, *_: Any, **__: Any) -> Any:
        return array(self) if dtype is None else array(self).astype(dtype)

    def form(self: FakeTensor, spec: str) -> str:
        if self.dim() == 0 and spec:
            return format(self.item(), spec)
        return str(self)

    def show(self: FakeTensor, **_: Any) -> str:
        if (real := known.value(self)) is not None:
            return f"{repr(real)[:-1]}, device='{_device_of(self)}')"
        dtype = "" if self.dtype is torch.float32 else f", dtype={self.dtype}"
        return f"tensor(no values, size={tuple(self.shape)}, device='{_device_of(self)}'{dtype})"

    yield FakeTensor, "numpy", lambda self, **_: array(self)
    yield FakeTensor, "__array__", as_array
    yield FakeTensor, "tolist", lambda self: array(self).tolist()
    yield FakeTensor, "__format__", form
    yield FakeTensor, "__repr__", show


def _device_of(tensor: FakeTensor) -> str:
    return "cuda" if tensor.fake_device.index is not None else "cpu"
