"""Which layer do the elements of the tensors that an optimizer updates belong to?

Wrappers update flat tensors and partitions of them; the walk reads attribute names of DeepSpeed's
wrappers (0.18.3 to 0.19.8) and of megatron-core's (0.16.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Piece = tuple[int, int, Any, int]
"""Address of an updated tensor, offset in it, parameter, and how many elements of it there are."""


@dataclass(frozen=True)
class Span:
    """Elements of an updated tensor, taken as one row, that belong to a layer."""

    layer: str
    start: int
    numel: int


def owners(engine: Any) -> dict[int, list[Span]]:
    """By the address of each updated tensor, the spans that are parameters; padding is in none."""
    layers = {id(parameter): layer_of(name) for name, parameter in engine.module.named_parameters()}
    found: dict[int, list[Span]] = defaultdict(list)
    for updated, offset, parameter, numel in _pieces(engine):
        if numel:
            found[updated].append(Span(layers[id(parameter)], offset, numel))
    return found


def layer_of(name: str) -> str:
    """The layer of a parameter: `layers.3.linear1.weight` belongs to `layers.3`, `head.weight` to
    `head`."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] or parts) if number is None else ".".join(parts[: number + 1])


def _pieces(engine: Any) -> Iterator[Piece]:
    wrapper, parameters = engine.optimizer, list(engine.module.parameters())
    if wrapper is engine.basic_optimizer:
        return ((parameter.data_ptr(), 0, parameter, parameter.numel()) for parameter in parameters)
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _zero3(wrapper)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters):
        return _zero12(parameters)
    if hasattr(wrapper, "fp32_groups_flat"):
        return _fused(wrapper)
    return next(_by_parameter(wrapper, *pair) for pair in BY_PARAMETER if hasattr(wrapper, pair[1]))


def _zero3(wrapper: Any) -> Iterator[Piece]:
    """A flat tensor per sub-group, a partition of each parameter after the other; what pads a
    partition is never written."""
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        sizes = [parameter.partition_numel() for parameter in group]
        for (updated, offset, parameter, size), rank in zip(_in_a_row(flat, group, sizes), map(_rank_in, group), strict=True):
            yield updated, offset, parameter, min(size, max(0, parameter.ds_numel - rank * size))


def _zero12(parameters: Sequence[Any]) -> Iterator[Piece]:
    """Stages 1 and 2, and BF16_Optimizer: what DeepSpeed links each parameter with
    (`utils/mixed_precision_linkage.py`)."""
    for parameter in parameters:
        if (mapping := parameter._hp_mapping) is not None:
            start, fragment = mapping.hp_fragment_address.start, mapping.hp_fragment
            yield fragment.data_ptr() - start * fragment.element_size(), start, parameter, fragment.numel()


def _fused(wrapper: Any) -> Iterator[Piece]:
    """FP16_Optimizer: a flat tensor per group."""
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
        yield from _in_a_row(flat, group, [parameter.numel() for parameter in group])


BY_PARAMETER = (
    ("fp16_groups", "fp32_groups"),
    ("float16_groups", "fp32_from_float16_groups"),
    ("model_float16_groups", "shard_fp32_from_float16_groups"),
)
"""Where wrappers keep parameters and a master copy of each, or of a part of each:
FP16_UnfusedOptimizer and megatron-core's two."""


def _by_parameter(wrapper: Any, parameters: str, copies: str) -> Iterator[Piece]:
    for group, masters in zip(getattr(wrapper, parameters), getattr(wrapper, copies), strict=True):
        for parameter, master in zip(group, masters, strict=True):
            yield master.data_ptr(), 0, parameter, master.numel()


def _rank_in(parameter: Any) -> int:
    """The number of this rank among those that have cut the parameter."""
    import torch.distributed

    return int(torch.distributed.get_rank(parameter.ds_process_group))


def _in_a_row(flat: Any, parameters: Sequence[Any], numels: Sequence[int]) -> Iterator[Piece]:
    offset = 0
    for parameter, numel in zip(parameters, numels, strict=True):
        yield flat.data_ptr(), offset, parameter, numel
        offset += numel
