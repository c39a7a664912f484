"""A walk through the forward and backward passes of a step: what it depends on, and what it finds
(`training.py` walks)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.closed_form.anatomy import Anatomy
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.program import Program, program, recorded
from bf16prof.closed_form.strategy import Launched, Strategy, StrategySettings
from bf16prof.models.autograd.events import ParameterKey
from bf16prof.models.autograd.tape import Precision
from bf16prof.models.tapes import ForwardRun
from bf16prof.vocabulary import Label

SETTLED = 2
"""Micro-steps after which those before the last repeat."""


@dataclass(frozen=True)
class WalkPlan:
    """Everything that a walk depends on. It does not say the number of ranks: equal plans share a
    walk."""

    anatomy: Anatomy
    run: ForwardRun
    precision: Precision
    block: int
    micro_steps: int
    outputs: tuple[tuple[Label, int], ...]
    """What the loop holds of a model's outputs until it has new ones: bytes by variable; none where
    it does not keep them."""
    loss: int
    """Bytes of the loss that it holds."""
    communication: tuple[int, int]
    """Bytes of an element of a gradient when it is reduced: of parameters that autocast casts, and
    of the others."""
    strategy_settings: StrategySettings
    memory_efficient_linear: bool
    workspace: int
    """Bytes of the cuBLAS workspace of a thread."""
    zero_init: bool
    """Whether the model is built inside `deepspeed.zero.Init`."""

    def walked_micro_steps(self) -> list[tuple[int, bool]]:
        """The micro-steps that differ, by number, and whether each is the last before the
        optimizer's step."""
        last = self.micro_steps - 1
        return [(number, number == last) for number in sorted({*range(min(last, SETTLED)), last})]

    def repetitions(self, number: int) -> int:
        """How many micro-steps are like the walked one of that number."""
        last = self.micro_steps - 1
        return last - number if number == SETTLED - 1 < last else 1

    @property
    def gathered_itemsizes(self) -> tuple[int, int]:
        """Bytes of an element of a parameter when it is gathered: of those that autocast casts, and
        of the others."""
        return self.precision.autocast or self.precision.parameter, self.precision.parameter

    def itemsizes(self) -> dict[ParameterKey, int]:
        """The same of every parameter."""
        return self._of_each(self.gathered_itemsizes)

    def communication_itemsizes(self) -> dict[ParameterKey, int]:
        """Bytes of an element of every gradient when it is reduced."""
        return self._of_each(self.communication)

    def _of_each(self, sizes: tuple[int, int]) -> dict[ParameterKey, int]:
        cast, other = sizes
        anatomy = self.anatomy
        return {key: cast if each.cast_by_autocast else other for key, each in zip(anatomy.keys, anatomy.parameters, strict=True)}

    def program(self) -> Program:
        """A micro-step of the model."""
        if self.anatomy.signature is not None:
            return recorded(self.anatomy.signature, self.block)
        has_hooks = self.strategy_settings.is_partitioned
        return program(self.run, self.precision, has_hooks, self.memory_efficient_linear or not has_hooks, self.block)


@dataclass(frozen=True, eq=False)
class Walked:
    """A walk: levels and peaks up to the end of backward, where the gradients are, and what was
    given to collectives.

    `launched`: of every micro-step, with how many are like it.
    """

    plan: WalkPlan
    meter: Meter
    program: Program
    gradients: Strategy
    launched: Sequence[tuple[int, Launched]]

    @property
    def numels(self) -> Mapping[ParameterKey, int]:
        """The elements of every parameter."""
        return self.plan.anatomy.numels

    @functools.cached_property
    def itemsizes(self) -> Mapping[ParameterKey, int]:
        """Bytes of an element of every parameter when it is gathered."""
        return self.plan.itemsizes()

    @functools.cached_property
    def communication(self) -> Mapping[ParameterKey, int]:
        """Bytes of an element of every gradient when it is reduced."""
        return self.plan.communication_itemsizes()

    @functools.cached_property
    def reduced(self) -> Sequence[tuple[int, tuple[ParameterKey, ...]]]:
        """The gradients that are reduced together, and how often in a step."""
        return [(times, keys) for times, launched in self.launched for keys in launched.reduced]
