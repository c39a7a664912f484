"""The table of optimizers against the optimizers: what they keep after a step on bf16 parameters, key by key and byte by byte."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS

from bf16prof.engine.client import make_client_optimizer
from bf16prof.engine.config import OURS, BasicOptimizer
from bf16prof.profiles.optimizers import all_optimizers, state_components
from bf16prof.profiles.recipes import all_recipes
from bf16prof.records import Component

pytestmark = DEEPSPEED_WARNINGS

CLIENTS = [layout for layout in all_optimizers().values() if layout.class_]
SETTINGS = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stepped(id_: str) -> tuple[Any, list[torch.nn.Parameter]]:
    """The optimizer after two steps on bf16 parameters of 35 and 3 elements."""
    make = make_client_optimizer({"optimizer": {"type": "AdamW", "params": SETTINGS}, OURS: {"optimizer": id_}})
    assert make is not None
    parameters = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in ((5, 7), (3,))]
    optimizer = make(parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize("layout", CLIENTS, ids=lambda layout: layout.id)
def test_a_library_keeps_what_the_table_says_and_nothing_else(layout: Any) -> None:
    optimizer, parameters = stepped(layout.id)

    for parameter in parameters:
        tensors = {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        states = {state.key: tensors.pop(state.key) for state in layout.states}
        assert {key: (value.shape, value.dtype) for key, value in states.items()} == {
            state.key: (parameter.shape, DTYPES[state.dtype_for("bf16")]) for state in layout.states
        }
        assert sorted(tensors) == ["step"] * any(counter.per == "tensor" for counter in layout.counters)
    scalars = [*tensors.values(), *(value for value in optimizer.param_groups[0].values() if isinstance(value, torch.Tensor))]
    assert len(scalars) == len(layout.counters)
    assert all(scalar.untyped_storage().nbytes() == 4 and scalar.device.type == "cpu" for scalar in scalars)


@pytest.mark.parametrize("layout", CLIENTS, ids=lambda layout: layout.id)
def test_a_library_is_told_the_settings_of_the_profile(layout: Any) -> None:
    optimizer, _ = stepped(layout.id)
    (group,) = optimizer.param_groups

    betas = group.get("betas") or (group["beta1"], group["beta2"])
    assert [float(group["lr"]), *betas, group["eps"], group["weight_decay"]] == pytest.approx([0.01, 0.9, 0.95, 1e-7, 0.1])


def test_steps_that_are_calls_are_marked() -> None:
    """An optimizer whose counter is the group's and not the tensor's takes every call for a step."""
    by_the_group = {layout.id for layout in CLIENTS if "step" in stepped(layout.id)[0].param_groups[0]}

    assert {layout.id for layout in CLIENTS if layout.counts_calls} == by_the_group


def test_every_name_in_the_table_is_known() -> None:
    assert {o.value for o in BasicOptimizer} - {"client", "not Adam"} == {
        id_.partition(",")[0] for id_, o in all_optimizers().items() if not o.class_
    }
    assert {recipe.optimizer for recipe in all_recipes().values()} - {""} == {layout.id for layout in CLIENTS}
    assert set(state_components().values()) == {Component.MOMENTUM, Component.VARIANCE, Component.COMPENSATION}
    assert all(importlib.util.find_spec(layout.package) and layout.requirement for layout in CLIENTS)
