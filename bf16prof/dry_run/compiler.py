"""PyTorch's compiler, left out: fake tensors read its settings, and importing all of it would take
as long as the dry run itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any
from unittest import mock

import torch


class _Compiler(types.ModuleType):
    """`torch._dynamo` before anybody needs more of it than its submodules and `disable`; the rest
    is imported when it is asked for."""

    def disable(self, function: Any = None, *_: Any, **__: Any) -> Any:
        """Nothing is compiled, so nothing has to be kept from it."""
        return function if function is not None else lambda f: f

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("_loading") or importlib.util.find_spec(f"{self.__name__}.{name}"):
            raise AttributeError(name)  # a submodule is imported without the rest
        self.__dict__["_loading"] = True
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def not_compiled(model: Any = None, **_: Any) -> Any:
    """`torch.compile`, which leaves a function as it is."""
    return model if model is not None else lambda function: function


def import_uncompiled(name: str) -> None:
    """Import a module whose functions are compiled as they are defined, without importing the
    compiler for that."""
    with mock.patch.object(torch, "compile", not_compiled):
        importlib.import_module(name)


def leave_out_the_compiler() -> None:
    """Let fake tensors read the compiler's settings without importing it, which would take as long
    as the dry run itself."""
    if "torch._dynamo" in sys.modules:
        return
    spec = importlib.util.find_spec("torch._dynamo")
    assert spec is not None
    module = _Compiler("torch._dynamo")
    module.__spec__, module.__file__, module.__package__ = spec, spec.origin, spec.name
    module.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["torch._dynamo"] = torch._dynamo = module
