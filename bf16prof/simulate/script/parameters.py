"""Parameters of a script's dry run have no values, whatever they are made of: `nn.Parameter(torch.randn(3))` is fake."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bf16prof.simulate.script.tracker import ScriptTracker


def parameter_maker(tracker: ScriptTracker, mode: FakeTensorMode) -> staticmethod[Any, Any]:
    """What takes the place of `nn.Parameter.__new__`."""
    real = nn.Parameter.__new__

    def new(cls: Any, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        given = torch.empty(0) if data is None else data
        if type(given) in (Tensor, nn.Parameter) and given.device.type != "meta":
            fake = without_values(given, mode)
            tracker.hand_over(given, fake)
            given = fake
        return real(cls, given, requires_grad)

    return staticmethod(new)


def without_values(tensor: Tensor, mode: FakeTensorMode) -> FakeTensor:
    """A fake tensor like this one, in a storage of the same size."""
    with torch._C._DisableTorchDispatch():
        plain = tensor.detach()
    fake: FakeTensor = mode.from_tensor(plain)
    fake.constant = None
    return fake
