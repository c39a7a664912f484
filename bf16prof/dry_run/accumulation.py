"""Where autograd adds a second gradient to a first one in place, and asks for no memory.

`InputBuffer::add` (torch/csrc/autograd/input_buffer.cpp) writes the sum into the first gradient
when nobody else holds that gradient or its storage and its elements lie densely. For tensor
subclasses, and so for fake tensors, it always makes a new tensor. `InPlaceSums` tells such
additions from all others, so that the tracker can answer them as PyTorch does for plain tensors.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor
DEVICE_OF = torch.ops.prim.device.default
ENGINE = "_engine_run_backward"
"""The Python function that calls autograd's engine (torch/autograd/graph.py)."""


class InPlaceSums:
    """Told of every operator in turn; knows an addition by the engine, whose first gradient belongs
    to nobody else.

    The engine looks at the devices of a node's gradients (`validate_outputs`) just before it adds
    them; a formula's own addition comes after other operators, and one in a Python function has
    that function's frame between the engine and the operator.
    """

    def __init__(self) -> None:
        self._after_device = False
        self._alone = _counts_of_one_owner()

    def see(self, func: Any, args: Any) -> bool:
        """Whether this call is such an addition."""
        before, self._after_device = self._after_device, func is DEVICE_OF
        return before and func is ADD and _belongs_to_the_engine(args, self._alone)


def _belongs_to_the_engine(args: Any, alone: tuple[int, int] | None) -> bool:
    first = args[0]
    return (
        isinstance(first, FakeTensor)
        and isinstance(args[1], Tensor)
        and torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()
        and _counts(first) == alone
        and _called_by_the_engine()
        and _is_dense(first)
    )


def _counts(tensor: Tensor) -> tuple[int, int]:
    """Owners of a tensor and of its storage, those of this call among them."""
    owners: Any = tensor
    return owners._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _called_by_the_engine() -> bool:
    """Whether no Python function runs between the engine and the operator, besides PyTorch's and
    this module's dispatch."""
    frame = sys._getframe(1)
    while frame is not None and (frame.f_code.co_name in _DISPATCH or frame.f_code.co_filename == __file__):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name == ENGINE


_DISPATCH = frozenset({"__torch_dispatch__", "_fn", "see", "inner"})


def _is_dense(tensor: Tensor) -> bool:
    """`is_non_overlapping_and_dense`."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class _Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    counts: tuple[int, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ADD and self.counts is None and torch._C._current_graph_task_id() != -1:
            self.counts = _counts(args[0])
        return func(*args, **(kwargs or {}))


def _counts_of_one_owner() -> tuple[int, int] | None:
    """What `_counts` gives for a gradient that only the engine holds: asked of the engine itself,
    by adding two fresh gradients."""
    with FakeTensorMode(), _Probe() as probe:  # type: ignore[no-untyped-call]
        x = torch.empty(2, 2, requires_grad=True)
        h = x * 2
        (h * 3 * (h * 5)).sum().backward()  # type: ignore[no-untyped-call]
    found: tuple[int, int] | None = probe.counts
    return found
