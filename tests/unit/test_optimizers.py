"""The table of optimizers against the optimizers: what they keep after a step on bf16 parameters,
key by key and byte by byte."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS

from bf16prof.engine.client import make_client_optimizer
from bf16prof.engine.config import OURS, BasicOptimizer
from bf16prof.profiles.optimizers import all_optimizers, library_ids, state_components
from bf16prof.profiles.recipes import all_recipes
from bf16prof.profiles.trainer_optimizers import trainer_optimizers
from bf16prof.vocabulary import Component

pytestmark = DEEPSPEED_WARNINGS

CLIENTS = [layout for layout in all_optimizers().values() if layout.class_]
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stepped(id_: str, shapes: Sequence[tuple[int, ...]] = ((5, 7), (3,))) -> tuple[Any, list[torch.nn.Parameter]]:
    """The optimizer after two steps on bf16 parameters of these shapes."""
    make = make_client_optimizer({"optimizer": {"type": "AdamW", "params": SETTINGS}, OURS: {"optimizer": id_}})
    assert make is not None
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
    optimizer = make(parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("layout", CLIENTS, ids=lambda layout: layout.id)
def test_a_library_keeps_what_the_table_says_and_nothing_else(layout: Any) -> None:
    shapes = ((5, 7), (3,), (64, 65), (4097,), (2, 40, 60))  # two of them at least 4,096 elements, in blocks of 256 with a rest
    optimizer, parameters = stepped(layout.id, shapes)

    kept: dict[str, dict[int, int]] = {}
    for parameter in parameters:
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                kept.setdefault(key, {})[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    states = {state.key: sorted(kept.pop(state.key, {}).values()) for state in layout.states}
    assert states == {state.key: sorted(state.sizes("bf16", shapes)) for state in layout.states}
    for state in layout.states:
        if state.is_plain:
            assert {optimizer.state[parameter][state.key].dtype for parameter in parameters} == {DTYPES[state.dtype_for("bf16")]}
    of_group = [value for value in optimizer.param_groups[0].values() if isinstance(value, torch.Tensor)]
    scalars = [size for sizes in kept.values() for size in sizes.values()] + [value.untyped_storage().nbytes() for value in of_group]
    assert scalars == [4] * sum(counter.count(len(shapes)) for counter in layout.counters)


@pytest.mark.parametrize("layout", CLIENTS, ids=lambda layout: layout.id)
def test_a_library_is_told_the_settings_of_the_profile(layout: Any) -> None:
    optimizer, _ = stepped(layout.id)
    (group,) = optimizer.param_groups

    said = {**group, "betas": group.get("betas") or (group.get("beta1"), group.get("beta2"))}
    for key in layout.settings:
        found, expected = said[key], SETTINGS[key]
        assert (list(found) if key == "betas" else float(found)) == pytest.approx(expected), key


def test_steps_that_are_calls_are_marked() -> None:
    """An optimizer whose counter is the group's and not the tensor's takes every call for a
    step."""
    by_the_group = {layout.id for layout in CLIENTS if "step" in stepped(layout.id)[0].param_groups[0]}

    assert {layout.id for layout in CLIENTS if layout.counts_calls} == by_the_group


def test_every_name_in_the_table_is_known() -> None:
    assert {o.value for o in BasicOptimizer} - {"client", "not Adam"} == {
        id_.partition(",")[0] for id_, o in all_optimizers().items() if not o.class_
    }
    brought = {recipe.optimizer for recipe in all_recipes().values()} - {""}
    assert brought | set(library_ids()) == {layout.id for layout in CLIENTS}
    named = {row["settings"].get("library", "") for row in trainer_optimizers().values() if "settings" in row} - {""}
    assert named <= set(library_ids())
    assert set(state_components().values()) == {Component.MOMENTUM, Component.VARIANCE, Component.COMPENSATION}
    assert all(importlib.util.find_spec(layout.package) and layout.requirement for layout in CLIENTS)
