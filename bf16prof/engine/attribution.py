"""Which component do the live bytes of an engine belong to?

The tensors that a DeepSpeed engine holds are walked in the order of `HOLDERS`, and each storage is given to the first component that
claims it, once. The walk reads attribute names of DeepSpeed's optimizer wrappers (0.18.3 to 0.19.8); it neither copies nor computes, so
it works on fake tensors as on real ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.optimizers import state_components
from bf16prof.records import Component, Item

C = Component

HOLDERS: tuple[tuple[Component, str, tuple[str, ...]], ...] = (
    (C.PARAMETERS, "flat parameters", ("bit16_groups_flat", "bf16_groups_flat", "fp16_groups_flat", "lp_param_buffer")),
    (C.PARAMETERS, "flat parameters on the host", ("param_groups_fp16_flat_cpu_memory",)),
    (C.MASTER_PARAMETERS, "master parameters", (
        "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "fp32_groups_flat", "fp32_groups",
    )),
    (C.GRADIENTS, "gradient partition", (
        "grad_partitions_flat_buffer", "averaged_gradients", "grads_in_partition", "fp32_groups_gradients_flat", "all_grad_tensors",
        "accumulated_grads_in_cpu",
    )),
    (C.BUFFERS, "parameter copy for the host optimizer", ("param_buffer_of_bit16_for_cpu_offload_groups",)),
    (C.BUFFERS, "gradient buffer for offloading", ("temp_grad_buffer_for_gpu_offload", "temp_grad_buffer_for_cpu_offload")),
)  # fmt: skip
"""Component, item name, and the attributes of DeepSpeed's optimizer wrappers that hold such tensors."""

STATES = {**state_components(), "momentum_buffer": C.MOMENTUM, "max_exp_avg_sq": C.VARIANCE, "step": C.WORKSPACE}
"""Optimizer states by the key under which optimizers keep them."""

HOST = torch.device("cpu")

Claim = tuple[Component, str, Any]


def attribute(engine: Any, kept: Mapping[str, Tensor], device: str | torch.device) -> tuple[list[Item], list[Item]]:
    """The items of everything the engine and the loop hold: on the device, and on the host.

    `device` is the one that the job runs on (`cuda`, `cpu`, or a dry run's `cpu:0`); ranks on CPU have one memory, so all their
    items are on the device.
    """
    home = torch.device(device)
    seen: set[int] = set()
    rounding = 0
    on_device: dict[tuple[Component, str], int] = {}
    on_host: dict[tuple[Component, str], int] = {}
    for component, name, tensor in held(engine, kept):
        if size := _claim_storage(tensor, seen):
            here = _is_on(tensor.device, home)
            place = on_device if here else on_host
            place[component, name] = place.get((component, name), 0) + size
            rounding += -size % ALLOCATOR_BLOCK_BYTES if here and home != HOST else 0
    if rounding:
        on_device[C.ROUNDING, f"blocks rounded up to {ALLOCATOR_BLOCK_BYTES} bytes"] = rounding
    return _items(on_device), _items(on_host)


def held(engine: Any, kept: Mapping[str, Tensor]) -> Iterator[tuple[Component, str, Tensor]]:
    """Every tensor that the engine and the loop hold, with its component and name, the most telling claim to a storage first."""
    for component, name, holder in _claims(engine, kept):
        for tensor in _tensors(holder):
            yield component, name, tensor


def _is_on(device: torch.device, home: torch.device) -> bool:
    """Whether a device is the job's own; a home without an index is any device of its type."""
    return device.type == home.type and home.index in (None, device.index)


def _items(sizes: Mapping[tuple[Component, str], int]) -> list[Item]:
    return [Item(component, name, size, "tensors held by the engine") for (component, name), size in sizes.items()]


def _claim_storage(tensor: Tensor, seen: set[int]) -> int:
    """Bytes of the tensor's storage if nobody claimed it yet, else 0."""
    if tensor.device.type == "meta":
        return 0
    storage = tensor.untyped_storage()
    if storage._cdata in seen:
        return 0
    seen.add(storage._cdata)
    return storage.nbytes()


def _claims(engine: Any, kept: Mapping[str, Tensor]) -> Iterator[Claim]:
    """Everything that may hold tensors, the most telling name first."""
    parameters = list(engine.module.parameters())
    wrapper, basic = engine.optimizer, getattr(engine, "basic_optimizer", None)
    for component, name, attributes in HOLDERS[:2]:
        yield component, name, [getattr(wrapper, a, None) for a in attributes]
    yield C.PARAMETERS, "partitioned parameters", [getattr(p, "ds_tensor", None) for p in parameters]
    yield C.PARAMETERS, "secondary partitions", [getattr(p, "ds_secondary_tensor", None) for p in parameters]
    persistent = [p for p in parameters if getattr(p, "ds_persist", False)]
    yield C.PARAMETERS, "persistent parameters", [p.data for p in persistent]
    yield C.PARAMETERS, "gathered parameters", [p.data for p in parameters if hasattr(p, "ds_tensor")]
    yield C.PARAMETERS, "parameters", [p.data for p in parameters]
    yield C.PARAMETERS, "model buffers", list(engine.module.buffers())
    for component, name, attributes in HOLDERS[2:]:
        yield component, name, [getattr(wrapper, a, None) for a in attributes]
    masters = [t for a in HOLDERS[2][2] for t in _tensors(getattr(wrapper, a, None))]
    yield C.MASTER_GRADIENTS, "master gradients", [t.grad for t in masters]
    yield C.GRADIENTS, "parameter gradients", [[p.grad, getattr(p, "grad_accum", None)] for p in parameters]
    yield C.BUFFERS, "reduce bucket", [vars(b) for b in getattr(wrapper, "ipg_buckets", {}).values() if hasattr(b, "__dict__")]
    for optimizer in (basic, getattr(wrapper, "optimizer", None), getattr(wrapper, "backup_optimizer", None)):
        yield from _states(optimizer)
    yield C.WORKSPACE, "placeholder of the second optimizer", getattr(getattr(wrapper, "backup_optimizer", None), "param_groups", None)
    for name, tensor in kept.items():
        yield C.ACTIVATIONS, f"{name} kept by the training loop", tensor
    for holder in (engine, wrapper, basic):
        for name, value in vars(holder).items():
            yield C.WORKSPACE, f"{type(holder).__name__}.{name}", value


def _states(optimizer: Any) -> Iterator[Claim]:
    for state in getattr(optimizer, "state", {}).values():
        for key, value in state.items():
            component = STATES.get(key, C.OTHER)
            name = "optimizer step counters" if key == "step" else f"optimizer state {key}"
            yield component, name, value


def _tensors(holder: Any, depth: int = 4) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(holder, Tensor):
        yield holder
    elif depth and isinstance(holder, Mapping):
        for value in list(holder.values()):
            yield from _tensors(value, depth - 1)
    elif depth and isinstance(holder, Iterable) and isinstance(holder, list | tuple | set | torch.nn.ParameterList):
        for value in list(holder):
            yield from _tensors(value, depth - 1)
