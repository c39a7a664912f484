"""The optimizers of libraries that some recipes need, as DeepSpeed takes them: a function from
parameters to an optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from bf16prof.engine.config import client_optimizer, optimizer_settings
from bf16prof.profiles.optimizers import OptimizerLayout


def import_client_optimizer(config: Mapping[str, Any]) -> None:
    """Import the library whose optimizer a configuration names, so that what it allocates for
    itself is not taken for the job's."""
    if layout := client_optimizer(config):
        importlib.import_module(layout.class_.rpartition(".")[0])


def make_client_optimizer(config: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """What makes the library's optimizer that a configuration names; `None` when it names none."""
    layout = client_optimizer(config)
    if layout is None:
        return None
    keywords = client_keywords(config, layout)
    return lambda parameters: _make(layout, list(parameters), keywords)


def client_keywords(config: Mapping[str, Any], layout: OptimizerLayout) -> dict[str, Any]:
    """What the library's optimizer is told besides the parameters."""
    given = optimizer_settings(config)
    return {**{key: given[key] for key in layout.settings if key in given}, **layout.arguments}


def _make(layout: OptimizerLayout, parameters: list[Any], keywords: Mapping[str, Any]) -> Any:
    import torch

    module, _, name = layout.class_.rpartition(".")
    optimizer = getattr(importlib.import_module(module), name)(parameters, **keywords)
    if all(parameter.device.type == "cpu" for parameter in parameters):
        optimizer.step = _uncompiled(optimizer.step)
    assert isinstance(optimizer, torch.optim.Optimizer), "DeepSpeed takes nothing else"
    return optimizer


def _uncompiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that runs as it is written where it would be compiled: for every shape anew, which
    takes longer on a CPU than it saves.

    What is computed is the same; a compiled step makes no temporaries.
    """

    def run(*arguments: Any, **keywords: Any) -> Any:
        import torch

        with torch.compiler.set_stance("force_eager"):
            return step(*arguments, **keywords)

    return run
