"""Which component do the live bytes of an engine belong to?

The tensors that an engine holds are walked in the order of `_claims`, and each storage is given to
the first component that claims it, once. The walk reads attribute names of DeepSpeed's optimizer
wrappers (0.18.3 to 0.19.8) and of megatron-core's (0.16.1); it neither copies nor computes, so it
works on fake tensors as on real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bf16prof.engine import labels
from bf16prof.engine.optimizer_states import state_label
from bf16prof.models.autograd.events import GRADIENT, local_variable
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.records import Item
from bf16prof.vocabulary import Label

Attributes = tuple[str, ...]
"""Attributes of DeepSpeed's optimizer wrappers that hold tensors of one kind."""

FLAT: Attributes = ("bit16_groups_flat", "bf16_groups_flat", "fp16_groups_flat", "lp_param_buffer", "param_groups_fp16_flat_cpu_memory")
MASTERS: Attributes = (
    "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "fp32_groups_flat", "fp32_groups",
    "fp32_from_float16_groups", "shard_fp32_from_float16_groups",  # megatron-core's
)  # fmt: skip
BESIDE: tuple[tuple[Label, Attributes], ...] = (
    (labels.GRADIENT_PARTITION, (
        "grad_partitions_flat_buffer", "averaged_gradients", "grads_in_partition", "fp32_groups_gradients_flat", "all_grad_tensors",
    )),
    (labels.PENDING_MOMENTUM, ("_muon_pending_momentum",)),
    (labels.ACCUMULATED_GRADIENTS, ("accumulated_grads_in_cpu",)),
    (labels.OFFLOADED_PARAMETERS, ("param_buffer_of_bit16_for_cpu_offload_groups",)),
    (labels.OFFLOADING_BUFFER, ("temp_grad_buffer_for_gpu_offload",)),
    (labels.OFFLOADING_HOST_BUFFER, ("temp_grad_buffer_for_cpu_offload",)),
)  # fmt: skip
"""What wrappers hold beside parameters and master parameters."""

HOST = torch.device("cpu")

Claim = tuple[Label, Any]


def attribute(engines: Sequence[Any], kept: Mapping[str, Any], device: str | torch.device) -> tuple[list[Item], list[Item]]:
    """The items of everything that several engines and their loop hold: on the device, and on the
    host.

    `device` is the one that the job runs on (`cuda`, `cpu`, or a dry run's `cpu:0`); ranks on CPU
    have one memory, so all their items are on the device.
    """
    home = torch.device(device)
    seen: set[int] = set()
    rounding = 0
    on_device: dict[Label, int] = {}
    on_host: dict[Label, int] = {}
    for label, tensor in held_by_all(engines, kept):
        here = _is_on(tensor.device, home)
        if size := _claim_storage(tensor, seen, counted=here):
            place = on_device if here else on_host
            place[label] = place.get(label, 0) + size
            rounding += -size % ALLOCATOR_BLOCK_BYTES if here and home != HOST else 0
    if rounding:
        on_device[labels.WHOLE_BLOCKS] = rounding
    return _items(on_device), _items(on_host)


def held(engine: Any, kept: Mapping[str, Any]) -> Iterator[tuple[Label, Tensor]]:
    """Every tensor that the engine and the loop hold, with its label, the most telling claim to a
    storage first."""
    for label, holder in _claims(engine, kept):
        for tensor in _tensors(holder):
            yield label, tensor


def held_by_all(engines: Sequence[Any], kept: Mapping[str, Any]) -> Iterator[tuple[Label, Tensor]]:
    """The same of several engines, told apart by number; what the loop holds comes with the
    first."""
    for number, engine in enumerate(engines, 1):
        for (component, name), tensor in held(engine, kept if number == 1 else {}):
            yield (component, name if number == 1 else f"{name} (engine {number})"), tensor


def _is_on(device: torch.device, home: torch.device) -> bool:
    """Whether a device is the job's own; a home without an index is any device of its type."""
    return device.type == home.type and home.index in (None, device.index)


def _items(sizes: Mapping[Label, int]) -> list[Item]:
    return [Item(*label, size, "tensors held by the engine") for label, size in sizes.items()]


def _claim_storage(tensor: Tensor, seen: set[int], *, counted: bool) -> int:
    """Bytes of the tensor's storage if nobody claimed it yet, else 0.

    `counted`: a probe counts what is allocated there. It does not see memory that PyTorch did not
    allocate (an array of NumPy's, a file), whose storage cannot be resized.
    """
    if tensor.device.type == "meta":
        return 0
    storage = tensor.untyped_storage()
    if storage._cdata in seen or (counted and not storage.resizable()):
        return 0
    seen.add(storage._cdata)
    return storage.nbytes()


def _claims(engine: Any, kept: Mapping[str, Any]) -> Iterator[Claim]:
    """Everything that may hold tensors, the most telling name first."""
    parameters = list(engine.module.parameters())
    wrapper, basic = engine.optimizer, getattr(engine, "basic_optimizer", None)
    contiguous = getattr(engine, "contiguous", [])  # megatron-core's
    yield labels.FLAT_PARAMETERS, [*_values(wrapper, FLAT), *(buffer.param_data for buffer in contiguous)]
    yield labels.PARTITIONED_PARAMETERS, [getattr(p, "ds_tensor", None) for p in parameters]
    yield labels.SECONDARY_PARTITIONS, [getattr(p, "ds_secondary_tensor", None) for p in parameters]
    yield labels.PERSISTENT_PARAMETERS, [p.data for p in parameters if getattr(p, "ds_persist", False)]
    yield labels.GATHERED_PARAMETERS, [p.data for p in parameters if hasattr(p, "ds_tensor")]
    yield labels.PARAMETERS, [p.data for p in parameters]
    yield labels.QUANTIZATION, [_of_quantization(getattr(p, "quant_state", None)) for p in parameters]
    if any(hasattr(p, "quant_state") for p in parameters):  # the table that all scales of 8 bits are copied from is a global one
        yield labels.QUANTIZATION, getattr(sys.modules.get("bitsandbytes.functional"), "name2qmap", {})
    yield labels.MODEL_BUFFERS, list(engine.module.buffers())
    yield labels.GRADIENT_BUFFERS, [buffer.grad_data for buffer in contiguous]
    masters = _values(wrapper, MASTERS)
    yield labels.MASTER_PARAMETERS, masters
    for label, attributes in BESIDE:
        yield label, _values(wrapper, attributes)
    yield labels.MASTER_GRADIENTS, [t.grad for t in _tensors(masters)]
    yield labels.REDUCE_BUCKET, [vars(b) for b in getattr(wrapper, "ipg_buckets", {}).values() if hasattr(b, "__dict__")]
    yield GRADIENT, [[p.grad, getattr(p, "grad_accum", None)] for p in parameters]  # those in a bucket are the bucket's
    for optimizer in (basic, getattr(wrapper, "optimizer", None), getattr(wrapper, "backup_optimizer", None)):
        yield from _states(optimizer)
    yield labels.PLACEHOLDER, getattr(getattr(wrapper, "backup_optimizer", None), "param_groups", None)
    for name, tensor in kept.items():
        yield local_variable(name), tensor
    for name, tensors in getattr(engine, "pipe_buffers", {}).items():
        yield labels.pipeline_buffer(name), tensors
        yield labels.pipeline_buffer("inputs"), [_leaves(tensor) for tensor in _tensors(tensors)]
    yield labels.RECEIVED, getattr(engine, "_grad_layer_buf", None)
    for holder in filter(None, (engine, wrapper, basic)):  # an engine that only evaluates has no optimizer
        for name, value in vars(holder).items():
            yield labels.held_by(type(holder).__name__, name), value
    for module in engine.module.modules():  # as DeepSpeed's gates keep the counts of their experts
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield labels.held_by(type(module).__name__, name), value


def _leaves(tensor: Tensor) -> list[Any]:
    """What the graph of a tensor ends in, and its gradients: the last stage of a pipeline keeps its
    outputs, and with them its inputs."""
    found, waiting, seen = list[Any](), [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found += [leaf, leaf.grad]
        waiting += [following for following, _ in node.next_functions]
    return found


def _of_quantization(state: Any) -> list[Any]:
    """The scales and tables of packed weights (bitsandbytes/functional.py, QuantState); of scales
    that are quantized, theirs too."""
    if state is None:
        return []
    return [state.absmax, state.offset, state.code, *_of_quantization(state.state2)]


def _values(wrapper: Any, attributes: Attributes) -> list[Any]:
    return [getattr(wrapper, attribute, None) for attribute in attributes]


def _states(optimizer: Any) -> Iterator[Claim]:
    for state in getattr(optimizer, "state", {}).values():
        for key, value in state.items() if isinstance(state, Mapping) else ():
            yield state_label(str(key), value), value


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
