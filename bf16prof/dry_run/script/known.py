"""Values of small GPU tensors that follow from the host: counters, lengths and flags that a script
puts on its GPU, lets its ranks agree on and reads again.

A fake tensor remembers a real one beside it. What is computed from such tensors alone is computed
for real as well; what is written in place by anything else is forgotten, as PyTorch counts the
writes to a storage. DeepSpeed's own scalars are left as they are in every dry run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from bf16prof.engine.nested import tensors_in
from bf16prof.scripts.face.callers import asked_by_deepspeed

MOST = 256
"""Elements of a tensor whose values are followed; a batch of token ids has more."""

_KNOWN = "_bf16prof_known"
_ATEN = torch.ops.aten
_FACTORIES = frozenset({
    _ATEN.zeros.default, _ATEN.ones.default, _ATEN.full.default, _ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step,
    _ATEN.scalar_tensor.default,
})  # fmt: skip
_SAME_ON_ALL = (dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.AVG, dist.ReduceOp.BAND, dist.ReduceOp.BOR)


def value(tensor: Tensor) -> Tensor | None:
    """The values of a tensor, as one of the host; `None` where nobody knows them."""
    if type(tensor) is Tensor:
        return tensor if tensor.device.type == "cpu" and tensor.numel() <= MOST else None
    real, version = tensor.__dict__.get(_KNOWN, (None, None))
    return real if version == tensor._version else None


def remember(tensor: Tensor, real: Tensor | None) -> None:
    """These are the values of a fake tensor from now on; `None`: nobody knows them."""
    if real is None:
        tensor.__dict__.pop(_KNOWN, None)
    elif not tensor.is_inference():
        tensor.__dict__[_KNOWN] = (real, tensor._version)


def follow(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """An operator has run on fake tensors: remember what it gave where all that it was given is
    known."""
    made = out if isinstance(out, list | tuple) else (out,)
    if not made or not all(isinstance(each, FakeTensor) and each.numel() <= MOST and not each.is_inference() for each in made):
        return
    given = list(tensors_in((args, kwargs)))
    if given:
        if any(isinstance(each, FakeTensor) and _KNOWN not in each.__dict__ for each in given):
            return
    elif func not in _FACTORIES or asked_by_deepspeed():
        return
    values = {id(each): value(each) for each in given}
    if any(each is None for each in values.values()) or torch.Tag.nondeterministic_seeded in func.tags:
        return
    for each, real in zip(made, _computed(func, args, kwargs, values), strict=False):
        remember(each, real)


def _computed(func: Any, args: Any, kwargs: Any, values: dict[int, Any]) -> Sequence[Tensor]:
    """What the same operator gives for the values, all of them on the host."""

    def real(each: Any) -> Any:
        if isinstance(each, Tensor):
            return values[id(each)].clone()
        if isinstance(each, list | tuple):
            return type(each)(map(real, each))
        return torch.device("cpu") if isinstance(each, torch.device) else each

    with torch._C._DisableTorchDispatch(), torch.no_grad():
        try:
            found = func(*map(real, args), **{name: real(each) for name, each in kwargs.items() if name != "pin_memory"})
        except (RuntimeError, IndexError, TypeError):
            return ()
    return found if isinstance(found, list | tuple) else (found,)


def true_elements(tensor: Tensor) -> Tensor | None:
    """The indices of the elements that are not zero, on the host; `None` where the values are not
    known."""
    real = value(tensor)
    with torch._C._DisableTorchDispatch():
        return None if real is None else real.nonzero()


def made_of_values(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor`, which remembers what a small GPU tensor was made of."""

    def tensor(data: Any, **kwargs: Any) -> Tensor:
        made = real(data, **kwargs)
        if isinstance(made, FakeTensor) and made.numel() <= MOST and not asked_by_deepspeed():
            with _disable_current_modes(), contextlib.suppress(RuntimeError, TypeError, ValueError):
                remember(made, real(data, **{**kwargs, "device": None, "requires_grad": False}))
        return made

    return tensor


def reduced(tensor: Tensor, before: Tensor | None, operation: Any, ranks: int) -> None:
    """An all-reduce is over; all ranks had this one's values."""
    if isinstance(tensor, FakeTensor):
        same = before if operation in _SAME_ON_ALL else before * ranks if before is not None and operation == dist.ReduceOp.SUM else None
        remember(tensor, same)


def gathered(parts: Any, before: Tensor | None) -> None:
    """An all-gather is over: every part has this rank's values."""
    for part in parts:
        if isinstance(part, FakeTensor):
            remember(part, None if before is None or part.shape != before.shape else before.clone())


def gathered_into(output: Tensor, before: Tensor | None) -> None:
    """The same into one tensor, one rank's part after the other."""
    if isinstance(output, FakeTensor):
        parts = 0 if before is None or not before.numel() else output.numel() // before.numel()
        remember(output, before.reshape(-1).repeat(parts).reshape(output.shape) if before is not None and parts else None)
