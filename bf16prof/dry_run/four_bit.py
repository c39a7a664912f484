"""bitsandbytes' 4-bit weights in a dry run, and what the kernels of its product hold while they
run.

A stand-in of the whole product would allocate the result alone. Both of bitsandbytes' ways are rows
of other operators: on a CPU `_gemm_4bit_default_impl` (backends/default/ops.py), on a GPU
`_dequant_linear_fallback` (backends/cuda/ops.py), which writes the whole weight anew. Up to 1,536
tokens a GPU may take a kernel that does not; which one depends on timings in a table, so the larger
is counted.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_DEFAULT = "bitsandbytes.backends.default.ops"


@contextlib.contextmanager
def four_bit(*, on_gpu: bool) -> Iterator[None]:
    """Replace the product where bitsandbytes has been imported; put back at the end."""
    if _DEFAULT not in sys.modules:
        yield
        return
    nn = sys.modules["bitsandbytes.nn"]
    product = _on_gpu if on_gpu else sys.modules[_DEFAULT]._gemm_4bit_default_impl
    with (
        mock.patch.object(torch.ops.bitsandbytes, "gemm_4bit", SimpleNamespace(default=product)),
        mock.patch.object(nn, "Params4bit", _Parameter),
        mock.patch.object(nn.modules, "Params4bit", _Parameter),
    ):
        yield


class _Parameter:
    """In the place of `Params4bit`: a tensor without values cannot become one of another class, so
    a parameter gets the attributes."""

    def __new__(cls, data: Tensor, requires_grad: bool = False, **attributes: Any) -> Any:
        """The parameter."""
        parameter = torch.nn.Parameter(data, requires_grad=requires_grad)
        for name, value in attributes.items():
            setattr(parameter, name, value)
        return parameter


def _on_gpu(
    x: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    *scales: Any,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What `_dequant_linear_fallback` allocates: scales that are quantized as numbers, before and
    after their offset, and the weight."""
    numbers = None if absmax_8bit is None else torch.empty_like(absmax_8bit, dtype=torch.float32)
    moved = None if numbers is None or absmax_offset is None else numbers + absmax_offset
    weight = torch.empty(shape, dtype=x.dtype, device=x.device)
    result = torch.nn.functional.linear(x, weight, bias)
    del moved
    return result
