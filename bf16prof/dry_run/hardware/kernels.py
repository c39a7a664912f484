"""What the kernels of the modelled device hold beyond the shapes of their outputs, and how well
that is known.

The tracker asks here for every operator. There are four answers: the shapes alone, where the
operator is known to hold nothing more; a formula, read off PyTorch's source; the real kernel, where
the census found that it can be asked (`asking`); and a note that the number is a lower bound.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bf16prof.dry_run.hardware.asking import Oracle, OutputStorage, outputs_of
from bf16prof.dry_run.hardware.registry import OperatorState, Registry
from bf16prof.dry_run.hardware.storages import Storages

Scratch = Mapping[Any, Callable[..., int]]
"""By operator, the bytes that its kernel allocates while it runs beyond its outputs, as a function
of its arguments."""


class How(enum.Enum):
    """Where the answer for an operator comes from."""

    SHAPES = "shapes"
    FORMULA = "formula"
    ASK = "the kernel itself"
    NOTE = "lower bound"


class Kernels:
    """The kernels of one device.

    `scratch` and `storages` are formulas; `registry` says which operators are known; `oracle` runs
    those that are asked, on a CPU (with `asks_all` whatever has no formula, which only the census
    does: a kernel may crash on zeros).
    """

    def __init__(
        self, scratch: Scratch, registry: Registry, storages: Storages, oracle: Oracle | None = None, *, asks_all: bool = False
    ) -> None:
        self._scratch, self._storages = scratch, storages
        self._registry, self._oracle = registry, oracle
        self._asks_all = asks_all
        self._how: dict[Any, How] = {}
        self.lower_bounds: dict[str, str] = {}
        """Operators whose memory the run did not fully count, each with the reason."""

    def finish(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
        """Give the outputs of a call the storages that the kernel gives them; the bytes of its
        scratch memory."""
        how = self._how.get(operator)
        if how is None:
            how = self._how[operator] = self._choose(operator)
        if how is How.SHAPES:
            return 0
        if how is How.ASK and _computes(operator, out) and self._oracle:
            if reply := self._oracle.reply(operator, args, kwargs):
                for output, real in zip(outputs_of(out), reply.outputs, strict=False):
                    if real is not None:
                        _become(output, real)
                return reply.scratch
            self._note(operator)
        if how is How.NOTE and _computes(operator, out):
            self._note(operator)
        if formula := self._storages.get(operator):
            for output, size in zip(outputs_of(out), formula(*args, **kwargs), strict=False):
                if size:
                    _become(output, OutputStorage(tuple(output.shape), size))
        return self._scratch[operator](*args, **kwargs) if operator in self._scratch else 0

    def _choose(self, operator: Any) -> How:
        entry = self._registry.entry(operator)
        has_formula = operator in self._scratch or operator in self._storages
        if entry is not None and entry.state is OperatorState.LOWER_BOUND:
            return How.NOTE
        if operator in self._scratch or (self._oracle is None and has_formula):
            return How.FORMULA
        if self._oracle and (self._asks_all or (entry is not None and entry.state is OperatorState.ASKED)):
            return How.ASK
        if has_formula:
            return How.FORMULA
        return How.SHAPES if self._registry.is_exact(operator) else How.NOTE

    def _note(self, operator: Any) -> None:
        self.lower_bounds.setdefault(str(operator._schema.name).partition("::")[2], self._registry.reason(operator))


def _computes(operator: Any, out: Any) -> bool:
    """Whether the operator may take memory: it gives a tensor that is not a view of another."""
    return not operator.is_view and any(isinstance(each, Tensor) for each in outputs_of(out))


def _become(output: Any, real: OutputStorage) -> None:
    """Give a fake tensor the dtype, the shape and the storage that the real one has."""
    if not isinstance(output, Tensor):
        return
    if real.dtype not in (None, output.dtype):
        output.data = output.new_empty(real.shape, dtype=real.dtype)
    if tuple(output.shape) != real.shape:
        output.resize_(real.shape)
    if output.untyped_storage().nbytes() != real.bytes:
        with torch._C._DisableTorchDispatch():
            output.untyped_storage().resize_(real.bytes)
