"""Asks PyTorch what a kernel on the CPU really allocates: runs it once, on tensors of the same
layout, and reads PyTorch's own account.

Fake tensors answer with shapes only. Some kernels hold more: a library's packed weights, a
workspace for backward, an output that was larger before it was reduced. Where no formula of ours
says how much, the kernel itself is the only source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ASKED_BYTES = 64 << 20
"""A call whose tensors hold more bytes a thread is not run: it would take the time of the real
job."""

Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
"""Dtype, sizes and strides of a tensor."""


@dataclass(frozen=True)
class OutputStorage:
    """An output in a storage of its own: its shape, the bytes of the storage, and its dtype where
    that is not the fake tensor's to say."""

    shape: tuple[int, ...]
    bytes: int
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Reply:
    """What a kernel allocated: `scratch`, bytes beside its outputs, and the outputs with storages
    of their own (`None`: the others)."""

    scratch: int
    outputs: tuple[OutputStorage | None, ...]


class UnequalDtypes(RuntimeError):
    """A call whose tensors have dtypes that no kernel takes: fake tensors let it pass."""


class Oracle:
    """Runs each question once. Answers are remembered by operator, threads and layouts."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Reply | None] = {}

    def reply(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reply | None:
        """What the kernel allocated; `None` where it was not run, because the call is too large or
        refused these values.

        Raises `UnequalDtypes` where the kernel refuses the dtypes: a real rank would end there.
        """
        tensors: list[Tensor] = []
        described = _describe((tuple(args), tuple(kwargs.items())), tensors)
        key = (operator, torch.get_num_threads(), torch.is_grad_enabled(), described, tuple(map(layout, tensors)))
        if key not in self._known:
            is_small = sum(map(_bytes, tensors)) <= ASKED_BYTES * torch.get_num_threads()
            self._known[key] = _run(operator, args, kwargs) if is_small else None
        return self._known[key]


def layout(tensor: Tensor) -> Layout:
    """How a tensor lies in memory."""
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def outputs_of(out: Any) -> Sequence[Any]:
    """The outputs of an operator as a row."""
    return out if isinstance(out, tuple | list) else (out,)


def peak_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that `run` holds beyond what was there before, by PyTorch's own account, and
    what it returns."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below that the profiler announces itself on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    assert profile.kineto_results is not None
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    return max(0, int(max(accumulate(e.nbytes() for e in events if e.name() == "[memory]"), default=0))), result


REFUSALS = (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError)


def _run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reply | None:
    with _disable_current_modes():  # gradients stay on or off as they are: oneDNN's recurrent layers keep a workspace only when they are on
        made: dict[int, Tensor] = {}
        given, named = _real(args, made), _real(dict(kwargs), made)
        try:
            peak, result = peak_bytes(lambda: operator(*given, **named))
        except REFUSALS as error:
            if _runs_in_fp32(operator, args, kwargs):
                raise UnequalDtypes(f"{operator._schema.name.partition('::')[2]} on a CPU: {error}") from error
            return None  # the values are zeros; some operators want others
        taken = {each.untyped_storage()._cdata for each in made.values()}
        outputs = tuple(_held(output, taken) for output in outputs_of(result))
        return Reply(max(0, peak - sum(output.bytes for output in outputs if output)), outputs)


def _runs_in_fp32(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the same call is taken once all of its floating tensors are fp32, so that their
    dtypes are what was refused."""
    made: dict[int, Tensor] = {}
    try:
        operator(*_real(args, made, torch.float32), **_real(dict(kwargs), made, torch.float32))
    except REFUSALS:
        return False
    return any(each.is_floating_point() for each in made.values())


def _held(output: Any, taken: set[int]) -> OutputStorage | None:
    if not isinstance(output, Tensor) or output.untyped_storage()._cdata in taken:
        return None
    taken.add(output.untyped_storage()._cdata)
    return OutputStorage(tuple(output.shape), output.untyped_storage().nbytes(), output.dtype)


def _real(value: Any, made: dict[int, Tensor], floating: torch.dtype | None = None) -> Any:
    """The same arguments with tensors of zeros, floating ones in another dtype if one is given. One
    that occurs twice is one tensor."""
    if isinstance(value, Tensor):
        if id(value) not in made:
            dtype = floating if floating and value.is_floating_point() else value.dtype
            made[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=dtype).zero_()
        return made[id(value)]
    if isinstance(value, Mapping):
        return {key: _real(each, made, floating) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_real(each, made, floating) for each in value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.itemsize)


def _describe(value: Any, tensors: list[Tensor]) -> Hashable:
    """Arguments without their tensors, which are collected; what is the same gives the same."""
    if isinstance(value, Tensor):
        same = next((index for index, each in enumerate(tensors) if each is value), None)
        if same is None:
            tensors.append(value)
        return ("tensor", len(tensors) - 1 if same is None else same)
    if isinstance(value, tuple | list):
        return tuple(_describe(each, tensors) for each in value)
    return type(value), value if isinstance(value, Hashable) else repr(value)
