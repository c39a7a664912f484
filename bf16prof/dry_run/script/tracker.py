"""The tracker of a script's dry run: host tensors keep their values, and what depends on values
that do not exist is answered.

Loaders, samplers, collators, padding and masks work on tensors of the host with values. A tensor
becomes fake when it meets a fake one, goes to the GPU, or becomes a parameter.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bf16prof.dry_run.script import known
from bf16prof.dry_run.script.invented import Invented
from bf16prof.dry_run.tracker import HOST, ITEM, Tracker
from bf16prof.engine.nested import tensors_in
from bf16prof.scripts.face.callers import asked_by_deepspeed

REAL_MOST = 32 << 20
"""Bytes of a host tensor made from nothing (`zeros`, `randn`) that is given values; a larger one is
nobody's batch."""

_ATEN = torch.ops.aten
NAMESPACES = frozenset({"aten", "prims", "prim"})


class ScriptTracker(Tracker):  # type: ignore[no-untyped-call]
    """Feeds a ledger as `Tracker` does; operators on host tensors with values are computed."""

    invented: Invented

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, for real where all it needs is real."""
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        if self._is_real(func, tensors, args, kwargs):
            return self._compute(func, args, kwargs)
        if func is ITEM:
            if (real := known.value(args[0])) is not None:
                with torch._C._DisableTorchDispatch():
                    return real.item()
            self.invented.note("the value of a tensor without one was read: 0.5, 0 or False")
        elif func in ANSWERS and any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with self:  # what an answer is made of is allocated as well
                answer = ANSWERS[func](self, *args, **kwargs)
            if answer is not None:
                return answer
        out = super().__torch_dispatch__(func, types, args, kwargs)
        known.follow(func, args, kwargs, out)
        return out

    def hand_over(self, old: Tensor, new: Tensor) -> None:
        """The storage of the second tensor takes the place of that of the first."""
        known = self._live.pop(old.untyped_storage()._cdata, None)
        if known is None:
            self.enter_given([new])
            return
        storage, allocation = new.untyped_storage(), known[1]
        key = storage._cdata
        gone = self._end_on_host(key, storage.nbytes()) if allocation is None else self._end(key, allocation)
        self._live[key] = weakref.ref(storage, gone), allocation

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out, device = super()._run(func, args, kwargs), kwargs.get("device")
        if isinstance(out, FakeTensor) and device is not None and out.fake_device != device:
            # PyTorch computes what it makes of a single number, and then takes it for the host's.
            out.fake_device, out.constant = device, None
        return out

    def _is_real(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
        device = kwargs.get("device")
        if device is not None and device != HOST:
            return False
        if func.namespace == "c10d":
            return bool(tensors) and all(_has_values(tensor) for tensor in tensors)
        if func.namespace not in NAMESPACES:
            return False
        if tensors:
            return all(_has_values(tensor) for tensor in tensors)
        return _bytes_of_factory(args, kwargs) <= REAL_MOST and not asked_by_deepspeed()

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch._C._DisableTorchDispatch():
            if func in GATHERS:
                GATHERS[func](*args)
            out = func(*args, **kwargs)
        if func.namespace != "c10d":
            self._see_all(func, out if isinstance(out, tuple | list) else (out,))
        return out


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device == HOST


def _bytes_of_factory(args: Any, kwargs: Any) -> int:
    """Bytes of what is made of a size, as its first list of numbers says it; of anything else a
    number of elements is no size."""
    size = next((value for value in args if isinstance(value, list | tuple) and all(isinstance(n, int) for n in value)), ())
    count = 1
    for extent in size:
        count *= extent
    if not size:
        count = max((abs(int(value)) for value in args if isinstance(value, int | float) and math.isfinite(value)), default=1)
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return count * int(dtype.itemsize)


def _same_shape(tracker: ScriptTracker, first: Tensor, second: Tensor) -> bool:
    tracker.invented.note("two tensors without values were compared: equal if of one shape", 2)
    return first.shape == second.shape and first.dtype == second.dtype


def _all_indices(tracker: ScriptTracker, tensor: Tensor) -> Tensor:
    if _has_values(tensor):
        return tensor.nonzero()
    if (real := known.true_elements(tensor)) is not None:
        indices = torch.empty(real.shape, dtype=torch.int64, device=tensor.device)
        known.remember(indices, real)
        return indices
    tracker.invented.note("the true elements of a mask without values: all of them", 2)
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64, device=tensor.device)


def _index(tracker: ScriptTracker, tensor: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    """Indexing with masks, as PyTorch does it: with the indices of their true elements."""
    if not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    expanded: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            expanded.append(index)
        else:
            expanded += [column.squeeze(1) for column in torch.split(_all_indices(tracker, index), 1, 1)] if index.dim() else [index]
    out: Tensor = torch.ops.aten.index.Tensor(tensor, expanded)
    return out


def _masked_select(tracker: ScriptTracker, tensor: Tensor, mask: Tensor) -> Tensor:
    tracker.invented.note("the true elements of a mask without values: all of them", 2)
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)  # type: ignore[no-untyped-call]
    return torch.empty((torch.Size(shape).numel(),), dtype=tensor.dtype, device=tensor.device)


def _unique(tracker: ScriptTracker, tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    tracker.invented.note("the different values of a tensor without values: as many as it has elements", 2)
    indices = torch.empty(tensor.shape, dtype=torch.int64, device=tensor.device)
    counts = torch.empty((tensor.numel(),), dtype=torch.int64, device=tensor.device)
    return torch.empty((tensor.numel(),), dtype=tensor.dtype, device=tensor.device), indices, counts


ANSWERS: dict[Any, Callable[..., Any]] = {
    _ATEN.equal.default: _same_shape,
    _ATEN.nonzero.default: _all_indices,
    _ATEN.index.Tensor: _index,
    _ATEN.masked_select.default: _masked_select,
    _ATEN._unique2.default: _unique,
    _ATEN.unique_consecutive.default: _unique,
}
"""What depends on values, by operator; `None` where the call does not."""


def _gather(outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> None:
    for parts, own in zip(outputs, inputs, strict=True):
        for part in parts:
            part.copy_(own)


def _gather_base(output: Tensor, own: Tensor, *_: Any) -> None:
    flat = output.view(-1, own.numel()) if own.numel() else output
    flat.copy_(own.reshape(1, -1).expand_as(flat))


GATHERS: dict[Any, Callable[..., None]] = {
    torch.ops.c10d.allgather_.default: _gather,
    torch.ops.c10d._allgather_base_.default: _gather_base,
}
"""Collectives of host tensors that bring other ranks' values: here all ranks have this one's."""
