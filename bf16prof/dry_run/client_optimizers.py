"""Libraries' optimizers in a dry run: on a GPU an update is one kernel without temporaries, on a
CPU a row of PyTorch's operators."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def client_optimizers(*, on_gpu: bool) -> Iterator[None]:
    """Replace in the libraries that have been imported; put back at the end."""
    rows = [row for row in (_ON_GPU if on_gpu else ()) if row[0] in sys.modules]
    with contextlib.ExitStack() as stack:
        for module, name in rows:
            stack.enter_context(mock.patch.object(sys.modules[module], name, _update))
        if not on_gpu and _BITSANDBYTES in sys.modules:
            # A fake tensor meets the operator's stand-in, which allocates nothing; its kernel for
            # the CPU is written in Python.
            for name in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"):
                kernel = getattr(sys.modules[_BITSANDBYTES], f"_{name}_cpu")
                stack.enter_context(mock.patch.object(torch.ops.bitsandbytes, name, kernel))
        yield


_ON_GPU = (
    ("torchao.optim.adam", "single_param_adam"),  # compiled to one kernel (Inductor fuses pointwise operators)
    ("optimi.adam", "_single_adam"),  # a Triton kernel, optimi/adam.py _triton_adam
)
_BITSANDBYTES = "bitsandbytes.backends.cpu.ops"


def _update(*_: Any, **__: Any) -> None:
    """An update in place."""
