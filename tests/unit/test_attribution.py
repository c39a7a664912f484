"""Attribution over engines made by hand from real tensors: each storage once, to the component with
the most telling name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bf16prof.engine.attribution import attribute
from bf16prof.engine.optimizer_states import state_label
from bf16prof.vocabulary import Component

C = Component


def engine(module: nn.Module | None = None, wrapper: dict[str, Any] | None = None, basic: Any = None, **own: Any) -> SimpleNamespace:
    return SimpleNamespace(module=module or nn.Module(), optimizer=SimpleNamespace(**wrapper or {}), basic_optimizer=basic, **own)


def held(found: SimpleNamespace, kept: dict[str, Tensor] | None = None) -> dict[tuple[Component, str], int]:
    """What the engine holds, in one memory."""
    if found.basic_optimizer is None:
        found.basic_optimizer = SimpleNamespace()
    items, host = attribute([found], kept or {}, "cpu")
    assert not host
    assert len({(i.component, i.name) for i in items}) == len(items)
    return {(i.component, i.name): i.bytes for i in items}


def storage_bytes(*tensors: Tensor) -> int:
    """Independent of attribution: the bytes of the tensors' different storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_parameters_that_are_views_of_a_flat_buffer_are_its_bytes() -> None:
    flat = torch.zeros(100, dtype=torch.bfloat16)
    module = nn.Module()
    module.a, module.b = nn.Parameter(flat[:60].view(6, 10)), nn.Parameter(flat[60:99])

    assert held(engine(module, {"bit16_groups_flat": [flat]})) == {(C.PARAMETERS, "flat parameters"): 200}


def test_a_small_view_keeps_its_whole_storage() -> None:
    assert held(engine(), {"loss": torch.zeros(1000)[3]}) == {(C.ACTIVATIONS, "loss kept by the training loop"): 4000}


def test_tied_weights_count_once() -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    module[1].weight = module[0].weight

    assert held(engine(module)) == {(C.PARAMETERS, "parameters"): 160}


def test_the_same_tensor_under_several_names_goes_to_the_first() -> None:
    master = torch.zeros(50)
    wrapper = {"single_partition_of_fp32_groups": [master], "fp32_groups_flat": [master], "some_cache": {"again": master}}

    assert held(engine(None, wrapper, again=master)) == {(C.MASTER_PARAMETERS, "master parameters"): 200}


def test_every_component_of_a_partitioned_engine() -> None:
    module = nn.Linear(6, 5)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    module.register_buffer("mask", torch.zeros(9, dtype=torch.bool))
    master = nn.Parameter(torch.zeros(40))
    master.grad = torch.zeros(40)
    basic = torch.optim.AdamW([master])
    basic.state[master] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(40), "exp_avg_sq": torch.zeros(40), "odd": torch.zeros(3)}
    wrapper = {
        "fp16_groups_flat": [torch.zeros(80, dtype=torch.bfloat16)],
        "single_partition_of_fp32_groups": [master],
        "averaged_gradients": {0: [torch.zeros(20, dtype=torch.bfloat16)]},
        "temp_grad_buffer_for_gpu_offload": torch.zeros(11),
        "temp_grad_buffer_for_cpu_offload": torch.zeros(12),
        "accumulated_grads_in_cpu": {0: torch.zeros(21)},
        "ipg_buckets": {torch.bfloat16: SimpleNamespace(buffer=[torch.zeros(13, dtype=torch.bfloat16)], elements=3)},
        "something": (torch.zeros(2), "text", None),
    }
    found = engine(module, wrapper, basic, _global_grad_norm=torch.tensor(0.0, dtype=torch.float64))
    kept = {"logits": torch.zeros(7)}

    assert held(found, kept) == {
        (C.PARAMETERS, "flat parameters"): 160,
        (C.PARAMETERS, "parameters"): (6 * 5 + 5) * 4,
        (C.PARAMETERS, "model buffers"): 9,
        (C.MASTER_PARAMETERS, "master parameters"): 160,
        (C.GRADIENTS, "gradient partition"): 40,
        (C.GRADIENTS, "accumulated gradients"): 84,
        (C.BUFFERS, "gradient buffer for offloading"): 44,
        (C.BUFFERS, "gradient buffer for offloading (host)"): 48,
        (C.MASTER_GRADIENTS, "master gradients"): 160,
        (C.GRADIENTS, "parameter gradients"): (6 * 5 + 5) * 4,
        (C.BUFFERS, "reduce bucket"): 26,
        (C.WORKSPACE, "optimizer step counters"): 4,
        (C.MOMENTUM, "optimizer state exp_avg"): 160,
        (C.VARIANCE, "optimizer state exp_avg_sq"): 160,
        (C.MOMENTUM, "optimizer state odd"): 12,
        (C.ACTIVATIONS, "logits kept by the training loop"): 28,
        (C.WORKSPACE, "SimpleNamespace._global_grad_norm"): 8,
        (C.WORKSPACE, "SimpleNamespace.something"): 8,
    }


def test_stage_3_partitions_and_persistent_parameters() -> None:
    module = nn.Linear(4, 3)
    for parameter in module.parameters():
        parameter.ds_tensor = torch.zeros(6, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    module.bias.ds_persist = True  # type: ignore[attr-defined]
    module.bias.data = torch.zeros(4, dtype=torch.bfloat16)

    assert held(engine(module)) == {(C.PARAMETERS, "partitioned parameters"): 24, (C.PARAMETERS, "persistent parameters"): 8}


def test_a_plain_optimizer_is_wrapper_and_basic_at_once_and_its_states_count_once() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    found = held(SimpleNamespace(module=model, optimizer=optimizer, basic_optimizer=optimizer))

    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(found.values()) == storage_bytes(*model.parameters(), *states, *gradients)
    assert found[C.MOMENTUM, "optimizer state exp_avg"] == found[C.VARIANCE, "optimizer state exp_avg_sq"] == 8 * 4
    assert found[C.WORKSPACE, "optimizer step counters"] == 2 * 4


def test_fake_and_meta_tensors_cost_nothing() -> None:
    assert held(engine(nn.Linear(100, 100, device="meta"))) == {}


def test_what_is_not_on_the_device_is_on_the_host() -> None:
    """As on a GPU whose optimizer is offloaded: nothing here is on `cuda`."""
    found = engine(None, {"fp32_partitioned_groups_flat": [torch.zeros(10)]}, SimpleNamespace())
    device, host = attribute([found], {}, "cuda")

    assert device == []
    assert [(item.component, item.bytes) for item in host] == [(C.MASTER_PARAMETERS, 40)]


@pytest.mark.parametrize("nesting", [lambda t: [[(t,)]], lambda t: {"a": {"b": [t]}}, lambda t: nn.ParameterList([t])])
def test_tensors_are_found_in_nested_holders(nesting: Any) -> None:
    assert held(engine(None, {"fp32_groups": nesting(nn.Parameter(torch.zeros(5)))})) == {(C.MASTER_PARAMETERS, "master parameters"): 20}


def test_holders_that_contain_themselves_end() -> None:
    endless: list[Any] = [torch.zeros(5)]
    endless.append(endless)

    assert held(engine(None, {"fp32_groups": endless})) == {(C.MASTER_PARAMETERS, "master parameters"): 20}


@pytest.mark.parametrize(("name", "options"), [
    ("Adagrad", {}), ("RMSprop", {"momentum": 0.9, "centered": True}), ("SGD", {"momentum": 0.9}), ("Adamax", {}), ("NAdam", {}),
    ("RAdam", {}), ("Adadelta", {}), ("AdamW", {"amsgrad": True}), ("ASGD", {}), ("Rprop", {}), ("Adafactor", {}), ("Muon", {}),
])  # fmt: skip
def test_no_state_of_an_optimizer_of_pytorch_is_other(name: str, options: dict[str, Any]) -> None:
    """A real optimizer makes a real step; what is as large as its parameter is an average of
    gradients or of their squares."""
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = getattr(torch.optim, name)([parameter], **options)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    components = {key: state_label(key, value)[0] for key, value in state.items() if isinstance(value, Tensor)}
    assert components
    assert Component.OTHER not in components.values()
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() == parameter.numel():
            assert components[key] in {Component.MOMENTUM, Component.VARIANCE}
        elif isinstance(value, Tensor) and value.numel() == 1:
            assert components[key] is Component.WORKSPACE


@pytest.mark.parametrize(("key", "component"), [
    ("exp_avg_sq_row", Component.VARIANCE), ("hessian", Component.VARIANCE), ("m", Component.MOMENTUM), ("v", Component.VARIANCE),
    ("momentum_1", Component.MOMENTUM), ("compensation", Component.COMPENSATION), ("error_feedback", Component.COMPENSATION),
    ("square_avg", Component.VARIANCE), ("whatever", Component.MOMENTUM),
])  # fmt: skip
def test_states_of_optimizers_that_nobody_listed_are_read_by_their_keys(key: str, component: Component) -> None:
    assert state_label(key, torch.ones(3, 4)) == (component, f"optimizer state {key}")


def test_single_numbers_are_counters() -> None:
    assert state_label("mu_product", torch.ones(()))[0] is Component.WORKSPACE
    assert state_label("step", torch.ones(()))[0] is Component.WORKSPACE
