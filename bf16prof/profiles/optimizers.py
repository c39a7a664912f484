"""What optimizers keep between steps, and what makes those that DeepSpeed's JSON cannot name (`optimizers.toml`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bf16prof.profiles.shipped import shipped_table
from bf16prof.records import Component

OWN = "own"
"""The dtype of a state that has that of the tensor which is updated."""


@dataclass(frozen=True)
class State:
    """A tensor of the shape of the updated one: the key that it is kept under, what it is for, and its dtype (`own`, or one of its own)."""

    key: str
    component: Component
    dtype: str

    def dtype_for(self, updated: str) -> str:
        """Its dtype beside an updated tensor of that dtype."""
        return updated if self.dtype == OWN else self.dtype


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
    * `class_`: the dotted name of a client's optimizer, `package` what is imported for it, `requirement` what pip installs, `arguments`
      what its constructor is told besides learning rate, betas, eps and weight decay. Empty for those that DeepSpeed makes by itself.
    * `debiased`: its moments are kept with Adam's correction for the first steps applied.
    * `counts_calls`: it counts its calls and not the updates of a tensor, so a step must be one call.
    """

    id: str
    states: tuple[State, ...]
    source: str
    counters: tuple[Counter, ...] = ()
    class_: str = ""
    package: str = ""
    requirement: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    counts_calls: bool = False
    debiased: bool = False

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
    states = tuple(State(key, Component(component), dtype) for key, component, dtype in row.pop("states"))
    counters = tuple(Counter(*counter) for counter in row.pop("counters", ()))
    return OptimizerLayout(id_, states, counters=counters, class_=row.pop("class", ""), **row)
