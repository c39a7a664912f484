"""What an operator gave for inputs of the same metadata, given again without asking PyTorch's fake
tensors.

A training step asks a few hundred different questions tens of thousands of times. Fake tensors
answer each in about 0.1 ms; a remembered answer takes a tenth of that. Only answers that follow
from shapes, strides, dtypes and devices are remembered: new storages, views of an input, inputs
themselves. Everything else goes on to the fake tensors, every time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bf16prof.rounding import ceil_div

Operator = Any
"""A `torch._ops.OpOverload`."""

UNPREDICTABLE = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operators that change the metadata of an input, or whose answer depends on values."""

ABSOLUTE_OFFSET = {torch.ops.aten.as_strided.default, torch.ops.aten.view.dtype}
"""Views whose offset is not that of their input plus a constant."""


DEVICE = "_fake_device" if isinstance(getattr(FakeTensor, "fake_device", None), property) else "fake_device"
"""Where a fake tensor keeps its device, which became a property after PyTorch 2.11."""

SERIAL = "_bf16prof_serial"
"""Attribute of a fake tensor that is its own (`shims._hash`)."""

SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True, slots=True)
class Fresh:
    """An output in a storage of its own, of so many bytes: as many as its shape needs, or more."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes: int


@dataclass(frozen=True, slots=True)
class View:
    """An output in the storage of one of the tensors given, its offset counted from that
    tensor's."""

    of: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Given:
    """An output that is one of the tensors given."""

    index: int


Answer = Fresh | View | Given | None


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """An operator call by its metadata, and the tensors that it was given, in order."""

    key: Hashable
    tensors: list[FakeTensor]


class Memo:
    """Remembers answers; makes fake tensors from them."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, tuple[type | None, tuple[Answer, ...], int]] = {}
        self._predictable: dict[Operator, bool] = {}
        self._template: dict[str, Any] = {}

    def question(self, func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> OperatorCall | None:
        """The call as a question; `None` when its answer cannot be remembered."""
        predictable = self._predictable.get(func)
        if predictable is None:
            predictable = self._predictable[func] = not UNPREDICTABLE & set(func.tags) and func.namespace == "aten"
        if not predictable:
            return None
        tensors: list[FakeTensor] = []
        try:
            if func is SLICE:
                return _slice(*args, **kwargs)
            described = _describe(args, tensors)
            named = _describe(tuple(kwargs.items()), tensors) if kwargs else None
            offset = tensors[0].storage_offset() if func in ABSOLUTE_OFFSET else None
            key = (func, described, named, offset, torch.get_default_dtype(), torch.is_grad_enabled())
            hash(key)
        except (_Indescribable, TypeError):
            return None
        return OperatorCall(key, tensors)

    def recall(self, question: OperatorCall) -> tuple[Any, list[FakeTensor], int] | None:
        """The answer to the question, those of its tensors that have new storages, and the bytes of
        scratch memory that were learned with it; `None` when it was never asked."""
        known = (None, (question.key,), 0) if isinstance(question.key, View) else self._answers.get(question.key)
        if known is None:
            return None
        container, answers, scratch = known
        fresh: list[FakeTensor] = []
        outputs = [self._make(answer, question.tensors, fresh) for answer in answers]
        return (outputs[0] if container is None else container(outputs)), fresh, scratch

    def learn(self, question: OperatorCall, out: Any, scratch: int = 0) -> None:
        """Remember an answer, if it can be made again, and the scratch memory that its kernel
        takes."""
        container = type(out) if isinstance(out, tuple | list) else None
        outputs = out if container else (out,)
        try:
            answers = tuple(_answer(each, question.tensors) for each in outputs)
        except _Indescribable:
            return
        fakes = [each for each, answer in zip(outputs, answers, strict=True) if isinstance(answer, Fresh | View)]
        if fakes and not self._template:
            self._template = {name: value for name, value in fakes[0].__dict__.items() if name != SERIAL}
        fresh = [each.untyped_storage()._cdata for each, answer in zip(outputs, answers, strict=True) if isinstance(answer, Fresh)]
        if len(set(fresh)) == len(fresh):
            self._answers[question.key] = (container, answers, scratch)

    def _make(self, answer: Answer, tensors: list[FakeTensor], fresh: list[FakeTensor]) -> FakeTensor | None:
        if isinstance(answer, Fresh):
            with torch._C._DisableTorchDispatch():
                bare = torch.empty_strided(answer.shape, answer.stride, dtype=answer.dtype, device="meta")
                if answer.bytes > bare.untyped_storage().nbytes():
                    bare.untyped_storage().resize_(answer.bytes)
            made = self._fake(bare, answer.device)
            fresh.append(made)
            return made
        if isinstance(answer, View):
            base = tensors[answer.of]
            storage = base.untyped_storage()
            with torch._C._DisableTorchDispatch():
                bare = torch.empty_strided((0,), (1,), dtype=answer.dtype, device="meta")
                bare.set_(storage, base.storage_offset() + answer.offset, answer.shape, answer.stride)
            return self._fake(bare, answer.device)
        return None if answer is None else tensors[answer.index]

    def _fake(self, bare: Tensor, device: torch.device) -> FakeTensor:
        """A fake tensor on that device over a bare one without memory (`FakeTensor.__new__`,
        without its checks)."""
        made: FakeTensor = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
        made.__dict__.update(self._template)
        made.__dict__[DEVICE] = device
        return made


def _slice(tensor: FakeTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> OperatorCall | None:
    """`aten.slice` knows its answer without being asked before: DeepSpeed cuts flat buffers at
    thousands of different places."""
    size, stride = int(tensor.shape[dim]), list(map(int, tensor.stride()))
    first, last, _ = slice(start, end, step).indices(size)
    shape = list(tensor.shape)
    shape[dim] = max(0, ceil_div(last - first, step))
    offset = first * stride[dim]
    stride[dim] *= step
    return OperatorCall(View(0, offset, tuple(shape), tuple(stride), tensor.dtype, tensor.fake_device), [tensor])


class _Indescribable(Exception):
    """Something that metadata do not say."""


def _describe(value: Any, tensors: list[FakeTensor]) -> Hashable:
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            raise _Indescribable
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.fake_device
    if isinstance(value, tuple | list):
        return tuple([_describe(each, tensors) for each in value])
    if isinstance(value, Tensor):
        raise _Indescribable
    return type(value), value


def _answer(out: Any, tensors: list[FakeTensor]) -> Answer:
    if out is None:
        return None
    if not isinstance(out, FakeTensor) or out.constant is not None:
        raise _Indescribable
    for index, tensor in enumerate(tensors):
        if out is tensor:
            return Given(index)
    storage = out.untyped_storage()
    for index, tensor in enumerate(tensors):
        if tensor.untyped_storage()._cdata == storage._cdata:
            offset = int(out.storage_offset()) - int(tensor.storage_offset())
            return View(index, offset, tuple(out.shape), tuple(out.stride()), out.dtype, out.fake_device)
    if out.storage_offset():
        raise _Indescribable
    return Fresh(tuple(out.shape), tuple(out.stride()), out.dtype, out.fake_device, storage.nbytes())
