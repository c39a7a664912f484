"""ZeRO-3's hooks on a model, DeepSpeed's own (`zero/parameter_offload.py`), around parameters that
come and go without being partitioned.

DeepSpeed says when a module is entered and left, forwards and backwards; here its parameters are
then made and dropped, so that what autograd holds of them shows (a `pin`). Who gathers them when is
the emulator's business (`closed_form/gathers.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload as offload
from deepspeed.utils.z3_leaf_module import z3_leaf_module
from torch import Tensor, nn

from bf16prof.models.autograd.events import NO_LAYER, ParameterKey
from bf16prof.signatures.signature import Called
from bf16prof.tracing.recorder import Recorder


class Hooks(offload.DeepSpeedZeRoOffload):  # type: ignore[misc]
    """Put on a model before its first pass, in which it is learned which parameters a module uses
    besides its own."""

    def __init__(self, model: nn.Module, recorder: Recorder, home: torch.device) -> None:
        self.module, self._recorder, self._home = model, recorder, home
        self.zenflow = False
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._keys = {id(parameter): ParameterKey(NO_LAYER, name) for name, parameter in model.named_parameters()}
        self._shapes = {id(parameter): parameter.shape for parameter in model.parameters()}
        self._strides = {id(parameter): parameter.stride() for parameter in model.parameters()}
        self._external: dict[int, list[Tensor]] = {}
        self._active: dict[int, int] = {}
        self._stack: list[nn.Module] = [model]
        self._called: dict[int, nn.Module] = {}
        self._is_learning = True
        self._pins = 0
        self._watched: dict[Any, Any] = {}
        for module in model.modules():
            module._parameters = Watched(module._parameters, self)
        offload.FWD_MODULE_STACK.append(model)
        self._register_deepspeed_module(model)

    def get_param_coordinator(self) -> None:
        """There is none."""

    def modules(self) -> tuple[Called, ...]:
        """Every module that was called, with what it fetches."""
        return tuple(
            Called(self._names[id(module)], tuple(self._keys[id(p)][1] for p in self._of(module)), z3_leaf_module(module))
            for module in self._called.values()
        )

    def leaf_of(self, parameter: Tensor) -> nn.Module | None:
        """The leaf module that a parameter is in."""
        leaf: nn.Module | None = getattr(parameter, "ds_z3_leaf_module", None)
        return leaf

    def leaves(self) -> list[nn.Module]:
        """Every leaf module."""
        return [module for module in self.module.modules() if z3_leaf_module(module)]

    def start(self) -> None:
        """What is learned is learned: from now on parameters are there only while a module has
        them."""
        self._is_learning = False
        self.empty()

    def empty(self) -> None:
        """Nothing is gathered."""
        self._active.clear()
        for parameter in self.module.parameters():
            self._drop(parameter)

    def used(self, parameter: Tensor) -> None:
        """Somebody reads a parameter: one that no running module has is that of the innermost
        (`ZeROOrderedDict.__getitem__`)."""
        if self._active.get(id(parameter)) or id(parameter) not in self._shapes or torch._C._current_graph_task_id() != -1:
            return
        if self._is_learning and len(self._stack) > 1:
            self._external.setdefault(id(self._stack[-1]), []).append(parameter)
            self._active[id(parameter)] = 1

    def pre_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        """A module is entered."""
        offload.FWD_MODULE_STACK.append(sub_module)
        self._stack.append(sub_module)
        self._called.setdefault(id(sub_module), sub_module)
        self._enter(sub_module, "fetch")

    def post_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        """It is left."""
        self._stack.pop()
        self._leave(sub_module, "release")

    def pre_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        """It is entered from the other side."""
        self._enter(sub_module, "fetch backward")

    def post_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        """It is left there."""
        self._leave(sub_module, "release backward")

    def _of(self, module: nn.Module) -> Iterator[Tensor]:
        """`iter_params`: each parameter once."""
        direct = module.parameters() if z3_leaf_module(module) else (p for p in dict.values(module._parameters) if p is not None)
        seen = {id(p): p for p in (*direct, *self._external.get(id(module), ()))}
        yield from seen.values()

    def _enter(self, module: nn.Module, kind: str) -> None:
        self._recorder.mark(kind, self._key(module))
        for parameter in self._of(module):
            self._active[id(parameter)] = self._active.get(id(parameter), 0) + 1
            if not self._is_learning and parameter.numel() != self._shapes[id(parameter)].numel():
                self._make(parameter)

    def _leave(self, module: nn.Module, kind: str) -> None:
        for parameter in self._of(module):
            left = self._active.get(id(parameter), 0) - 1
            self._active[id(parameter)] = max(0, left)
            if left == 0 and not self._is_learning:
                self._let_go(parameter)
        self._recorder.mark(kind, self._key(module))

    def _key(self, module: nn.Module) -> ParameterKey:
        return ParameterKey(NO_LAYER, self._names[id(module)])

    def _make(self, parameter: Tensor) -> None:
        with self._recorder.aside(), torch.no_grad():
            parameter.data = torch.empty_strided(
                self._shapes[id(parameter)], self._strides[id(parameter)], dtype=parameter.dtype, device=self._home
            )

    def _drop(self, parameter: Tensor) -> None:
        with self._recorder.aside(), torch.no_grad():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._home)

    def _let_go(self, parameter: Tensor) -> None:
        """Drop its memory; if somebody still has a view of that, it is pinned until they let go."""
        storage = parameter.untyped_storage()
        watch = weakref.ref(storage, lambda _: self._unpin(number))
        self._pins = number = self._pins + 1
        del storage
        self._drop(parameter)
        if watch() is not None:
            self._watched[number] = watch, self._keys[id(parameter)]
            self._recorder.mark("pin", (self._keys[id(parameter)], number))

    def _unpin(self, number: int) -> None:
        if (known := self._watched.pop(number, None)) is not None:
            self._recorder.mark("unpin", (known[1], number))


class Watched(dict[str, Any]):
    """`nn.Module._parameters` that tells who is read."""

    def __init__(self, content: dict[str, Any], hooks: Hooks) -> None:
        super().__init__(content)
        self._hooks = hooks
        self._in_forward = False

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._hooks.used(parameter)
        return parameter
