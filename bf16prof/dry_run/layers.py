"""Which module of the model runs, for the storages that it allocates:
`model.layers.3.mlp.gate_proj`.

Forward passes are followed, and with activation checkpointing the recomputed ones. What autograd's
own backward allocates has no module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

from bf16prof.dry_run.ledger import Ledger


class Layers:
    """Tells the ledger the name of the innermost module that runs. Modules have names once `name`
    has seen their model.

    `entered` is told of every named module that begins.
    """

    def __init__(self, ledger: Ledger, entered: Callable[[nn.Module], None] = lambda module: None) -> None:
        self._ledger, self._entered = ledger, entered
        self._names: dict[int, str] = {}
        self._open: list[tuple[int, str]] = []

    def name(self, model: nn.Module) -> None:
        """Learn the names of a model's modules."""
        self._names |= {id(module): name for name, module in model.named_modules() if name}

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follow all modules while the context lasts.

        The hooks are those of all modules, for a module with a hook of its own takes another path
        in places (`nn.TransformerEncoder`).
        """
        entered = hooks.register_module_forward_pre_hook(self._enter)
        left = hooks.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            entered.remove()
            left.remove()

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if (name := self._names.get(id(module))) is not None:
            self._open.append((id(module), self._ledger.layer))
            self._ledger.layer = name
            self._entered(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        """Also where a module ends by an exception, as the last that a checkpoint recomputes
        does."""
        while self._open and id(module) in self._names:
            opened, self._ledger.layer = self._open.pop()
            if opened == id(module):
                return
