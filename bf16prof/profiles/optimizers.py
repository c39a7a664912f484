"""What optimizers keep between steps, and what makes those that DeepSpeed's JSON cannot name
(`optimizers.toml`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bf16prof.profiles.recipes import DTYPE_BYTES, all_recipes
from bf16prof.profiles.shipped import shipped_table
from bf16prof.rounding import ceil_div
from bf16prof.vocabulary import Component

OWN = "own"
"""The dtype of a state that has that of the tensor which is updated."""


SETTINGS = ("lr", "betas", "eps", "weight_decay")
"""What most optimizers are told of the profile's."""

Shape = tuple[int, ...]

BLOCKWISE_FROM = 4096
"""bitsandbytes: fewer elements are kept in fp32 (`min_8bit_size`)."""
BLOCK = 256
"""bitsandbytes: so many elements share a largest value."""
MAP_BYTES = 4 * 256


def _eight_bit(shapes: Sequence[Shape]) -> list[int]:
    return [numel * (1 if numel >= BLOCKWISE_FROM else 4) for numel in map(math.prod, shapes)]


def _blocks(shapes: Sequence[Shape]) -> list[int]:
    return [4 * ceil_div(numel, BLOCK) for numel in map(math.prod, shapes) if numel >= BLOCKWISE_FROM]


def _map(shapes: Sequence[Shape]) -> list[int]:
    return [MAP_BYTES] if any(math.prod(shape) >= BLOCKWISE_FROM for shape in shapes) else []


RULES: Mapping[str, Callable[[Sequence[Shape]], list[int]]] = {
    "8-bit": _eight_bit,
    "8-bit blocks": _blocks,
    "8-bit map": _map,
    "fp32 twice": lambda shapes: [8 * math.prod(shape) for shape in shapes],
    "8-bit twice": lambda shapes: [2 * size for size in _eight_bit(shapes)],
    "8-bit blocks twice": lambda shapes: [2 * size for size in _blocks(shapes)],
    "rows": lambda shapes: [4 * math.prod(shape[:-1]) for shape in shapes if len(shape) > 1],
    "columns": lambda shapes: [4 * math.prod((*shape[:-2], shape[-1])) for shape in shapes if len(shape) > 1],
    "vectors": lambda shapes: [4 * math.prod(shape) for shape in shapes if len(shape) <= 1],
}
"""Bytes of the tensors of a state that has no dtype and shape of the updated tensors', given the
shapes of those. Adafactor, all in fp32: rows and columns of a matrix, and what has one dimension,
as all that ZeRO has made flat. Twice: two averages in one tensor."""


@dataclass(frozen=True)
class OptimizerState:
    """A kind of tensor that is kept for every updated one: the key that it is kept under, what it
    is for, and its dtype (`own`, or one of its own) where it has the shape of the updated one, else
    the rule that says its bytes (`RULES`)."""

    key: str
    component: Component
    dtype: str

    @property
    def is_plain(self) -> bool:
        """Whether it is a tensor of the shape of the updated one."""
        return self.dtype not in RULES

    def dtype_for(self, updated: str) -> str:
        """Its dtype beside an updated tensor of that dtype."""
        return updated if self.dtype == OWN else self.dtype

    def sizes(self, updated: str, shapes: Sequence[Shape]) -> list[int]:
        """The bytes of its tensors beside updated tensors of that dtype and these shapes."""
        if not self.is_plain:
            return RULES[self.dtype](shapes)
        return [DTYPE_BYTES[self.dtype_for(updated)] * math.prod(shape) for shape in shapes]


@dataclass(frozen=True)
class Counter:
    """A scalar of four bytes, one per updated tensor or one of the whole optimizer."""

    name: str
    per: str
    place: str

    def count(self, tensors: int) -> int:
        """How many there are beside so many updated tensors."""
        return tensors if self.per == "tensor" else 1

    @property
    def on_host(self) -> bool:
        """Whether it lies in host memory wherever the update runs."""
        return self.place == "host"


@dataclass(frozen=True)
class OptimizerLayout:
    """One optimizer.

    * `states`, `counters`: what it keeps; `source`: where that is written.
    * `class_`: the dotted name of a client's optimizer, `package` what is imported for it,
      `requirement` what pip installs, `arguments` what its constructor is told besides `settings`.
      Empty for those that DeepSpeed makes by itself.
    * `settings`: which of the profile's the constructor takes.
    * `temporaries`: where an update makes some that have no closed form: `cpu`, `all`, or nowhere.
    * `debiased`: its moments are kept with Adam's correction for the first steps applied.
    * `counts_calls`: it counts its calls and not the updates of a tensor, so a step must be one
      call.
    """

    id: str
    states: tuple[OptimizerState, ...]
    source: str
    counters: tuple[Counter, ...] = ()
    class_: str = ""
    package: str = ""
    requirement: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = SETTINGS
    temporaries: str = ""
    counts_calls: bool = False
    debiased: bool = False

    @property
    def is_adam(self) -> bool:
        """Whether it keeps Adam's two moments as they are."""
        return {Component.MOMENTUM, Component.VARIANCE} <= {state.component for state in self.states if state.is_plain}

    @property
    def distribution(self) -> str:
        """The name that pip knows the package by."""
        return self.requirement.partition(">")[0]


@functools.cache
def all_optimizers() -> dict[str, OptimizerLayout]:
    """Every optimizer by id, in the order of the file."""
    table = shipped_table("optimizers.toml")
    return {id_: _layout(id_, row) for id_, row in table.items()}


@functools.cache
def state_components() -> dict[str, Component]:
    """What the states of all optimizers are for, by the key that they are kept under."""
    return {state.key: state.component for layout in all_optimizers().values() for state in layout.states}


def _layout(id_: str, row: dict[str, Any]) -> OptimizerLayout:
    states = tuple(OptimizerState(key, Component(component), dtype) for key, component, dtype in row.pop("states"))
    counters = tuple(Counter(*counter) for counter in row.pop("counters", ()))
    settings = tuple(row.pop("settings", SETTINGS))
    return OptimizerLayout(id_, states, counters=counters, class_=row.pop("class", ""), settings=settings, **row)


def library_ids() -> list[str]:
    """What `[optimizer] library` may name: the libraries' optimizers that no recipe brings."""
    brought = {recipe.optimizer for recipe in all_recipes().values()}
    return [id_ for id_, layout in all_optimizers().items() if layout.class_ and id_ not in brought]
