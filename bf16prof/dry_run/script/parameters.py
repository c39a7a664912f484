"""Parameters of a script's dry run have no values, whatever they are made of:
`nn.Parameter(torch.randn(3))` is fake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bf16prof.dry_run.script.tracker import ScriptTracker
from bf16prof.scripts.face.module import Row


def replacements(tracker: ScriptTracker, mode: FakeTensorMode) -> Iterator[Row]:
    """All that is replaced: how parameters are made, and what may become the data of one."""
    data: Any = FakeTensor.data

    def set_data(self: FakeTensor, value: Tensor) -> None:
        data.__set__(self, _faked(value, tracker, mode))

    yield nn.Parameter, "__new__", _parameter_maker(tracker, mode)
    yield FakeTensor, "data", property(data.__get__, set_data)


def _faked(tensor: Tensor, tracker: ScriptTracker, mode: FakeTensorMode) -> Tensor:
    """A fake tensor in the place of one with values."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta":
        return tensor
    fake = without_values(tensor, mode)
    tracker.hand_over(tensor, fake)
    return fake


def _parameter_maker(tracker: ScriptTracker, mode: FakeTensorMode) -> staticmethod[Any, Any]:
    real = nn.Parameter.__new__

    def new(cls: Any, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        given = torch.empty(0) if data is None else data
        return real(cls, _faked(given, tracker, mode), requires_grad)

    return staticmethod(new)


def without_values(tensor: Tensor, mode: FakeTensorMode) -> FakeTensor:
    """A fake tensor like this one, in a storage of the same size."""
    with torch._C._DisableTorchDispatch():
        plain = tensor.detach()
    fake: FakeTensor = mode.from_tensor(plain)
    fake.constant = None
    return fake
