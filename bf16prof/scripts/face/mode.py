"""Lets every torch call that names a CUDA device work on the device that stands for it.

A mode sees factories, `Tensor.to` and `.cuda`, `nn.Module.to` (`_parse_to`) and the rest of what
can be overridden. Devices stay CUDA's in the script's hands, so that what it compares and prints is
what it would find on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import checkpoint

from bf16prof.scripts.face.module import Row

PINNING = ("pin_memory", "is_pinned")


def is_cuda(value: Any) -> bool:
    """Whether a value names a CUDA device."""
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


def means(home: torch.device, value: Any) -> bool:
    """Whether a value names the rank's device: a CUDA device, and where there is none "cpu:0",
    which to real tensors is the host."""
    if is_cuda(value) or home.index is not None or not isinstance(value, str | torch.device):
        return is_cuda(value)
    device, _, index = str(value).partition(":")
    return device == home.type and index.isdecimal()


def is_index(value: Any) -> bool:
    """Whether a value is a device's index."""
    return isinstance(value, int) and not isinstance(value, bool)


class CudaFace(TorchFunctionMode):
    """Rewrites CUDA devices in torch's calls into `home`; a bare index is a GPU's."""

    def __init__(self, home: torch.device) -> None:
        super().__init__()
        self._home = home

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of torch's."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.backward:
            with self:  # it runs hooks of the script's
                return _backward(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0].to(self._home, non_blocking=bool(kwargs.get("non_blocking", False)))
        if name in PINNING:
            return args[0] if name == "pin_memory" else False
        if func is torch.Tensor.type:
            return self._type(func, args, kwargs)
        if func is not torch.device:
            args, kwargs = self._at_home(name, args, kwargs)
        return func(*args, **kwargs)

    def _at_home(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if any(means(self._home, each) for each in args):
            args = tuple(self._home if means(self._home, each) else each for each in args)
        if kwargs:
            if means(self._home, kwargs.get("device")) or is_index(kwargs.get("device")):
                kwargs = {**kwargs, "device": self._home}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        at = {"to": 1, "_parse_to": 0}.get(name)
        if at is not None and len(args) > at and is_index(args[at]):
            args = (*args[:at], self._home, *args[at + 1 :])
        return args, kwargs

    def _type(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`Tensor.type`: names such as "torch.cuda.FloatTensor", of the tensor or to be made of
        it."""
        wanted = args[1] if len(args) > 1 else kwargs.get("dtype")
        if wanted is None:
            said = str(func(*args, **kwargs))
            return said.replace("torch.", "torch.cuda.", 1) if args[0].device == self._home and "cuda" not in said else said
        if isinstance(wanted, str) and wanted.startswith("torch.cuda."):
            return args[0].to(self._home).type(wanted.replace("torch.cuda.", "torch.", 1))
        return func(*args, **kwargs)

    def again(self) -> contextlib.AbstractContextManager[Any]:
        """This mode where no mode is in force."""
        return contextlib.nullcontext() if _get_current_function_mode_stack() else self  # type: ignore[no-untyped-call]


def in_backward(face: CudaFace) -> Iterator[Row]:
    """What has to be told of the mode again: autograd calls Python without it, for a function's own
    backward and to recompute."""
    real_apply, real_checkpoint = BackwardCFunction.apply, checkpoint._checkpoint_without_reentrant_generator

    def apply(self: Any, *gradients: Any) -> Any:
        with face.again():
            return real_apply(self, *gradients)  # type: ignore[no-untyped-call]

    def without_reentry(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            with face.again():
                return function(*given, **named)

        return real_checkpoint(call, *args, **kwargs)

    yield BackwardCFunction, "apply", apply
    yield checkpoint, "_checkpoint_without_reentrant_generator", without_reentry


def _backward(tensor: torch.Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None) -> None:
    """`Tensor.backward`, which would ask the mode again."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)
