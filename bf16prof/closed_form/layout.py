"""How DeepSpeed cuts parameters into partitions: padding, alignment, sub-groups, persistence. All
counts are elements.

References are to DeepSpeed 0.19.8, `deepspeed/runtime/zero/`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

from bf16prof.profiles.schema import ZeroSettings
from bf16prof.rounding import ceil_div, round_up

NCCL_ALIGNMENT = 2
"""`nccl_start_alignment_factor`: flat buffers of stages 1 and 2 are padded to this many elements
per rank (stage_1_and_2.py)."""
PARAMETER_ALIGNMENT_BYTES = 16
"""With `parameter_alignment`, parameters start at multiples of this inside the flat buffer
(stage_1_and_2.py)."""

REMEMBERED = 64
T = TypeVar("T")


def flat_numel(numels: Sequence[int], world_size: int, zero: ZeroSettings, element_bytes: int) -> int:
    """Elements of the flat buffer of stages 1 and 2: all parameters, padded to `NCCL_ALIGNMENT` x
    ranks.

    `numels` is in the order of the buffer; padding between parameters depends on it
    (stage_1_and_2.py, __init__).
    """
    total = flat_spans(numels, world_size, zero, element_bytes)[-1][1] if zero.parameter_alignment else sum(numels)
    return round_up(total, NCCL_ALIGNMENT * world_size)


def flat_spans(numels: Sequence[int], world_size: int, zero: ZeroSettings, element_bytes: int) -> list[tuple[int, int]]:
    """Where each parameter starts and ends in the flat buffer of stages 1 and 2, in its order
    there.

    `round_robin_gradients` deals the parameters out to the ranks in turn (stage_1_and_2.py,
    _round_robin_reorder).
    """
    step = PARAMETER_ALIGNMENT_BYTES // element_bytes if zero.parameter_alignment else 1
    return _spans(tuple(numels), world_size if zero.round_robin_gradients else 1, step)


@functools.lru_cache(maxsize=REMEMBERED)
def _spans(numels: tuple[int, ...], ranks: int, step: int) -> list[tuple[int, int]]:
    spans, start = [], 0
    for n in dealt_out(numels, ranks):
        spans.append((start, start + n))
        start = round_up(start + n, step)
    return spans


def dealt_out(parameters: Sequence[T], ranks: int) -> list[T]:
    """The parameters in the order of a flat buffer in which they are dealt out to so many ranks in
    turn."""
    return [parameter for rank in range(ranks) for parameter in parameters[rank::ranks]]


def touched_numel(spans: Sequence[tuple[int, int]], partition: int) -> int:
    """The most that any rank's partition touches: full sizes of all parameters that lie in it, even
    in part (get_partition_info)."""
    touched: dict[int, int] = {}
    for start, end in spans:
        for rank in range(start // partition, (end - 1) // partition + 1):
            touched[rank] = touched.get(rank, 0) + end - start
    return max(touched.values())


def partition_numels(numels: Sequence[int], world_size: int) -> list[int]:
    """Elements of each parameter's partition at stage 3: every rank holds ceil(n / ranks), the last
    ones padded (partition_parameters.py, _partition_param)."""
    return [ceil_div(n, world_size) for n in numels]


def sub_groups(partitions: Sequence[int], sub_group_size: int) -> list[int]:
    """Elements of the stage-3 sub-groups: partitions are added until `sub_group_size` is reached
    (stage3.py, _create_fp16_sub_groups)."""
    if sub_group_size >= sum(partitions):
        return [sum(partitions)]
    groups, current = [], 0
    for index, size in enumerate(partitions):
        current += size
        if current >= sub_group_size or index == len(partitions) - 1:
            groups.append(current)
            current = 0
    return groups


def kept_groups(groups: Sequence[int], ratio: float) -> list[int]:
    """The sub-groups that stay on the device when `offload_optimizer.ratio` of them is offloaded
    (stage3.py, _create_fp32_partitions)."""
    return list(groups[: int((1 - ratio) * len(groups))])


def persistent(numels: Sequence[int], zero: ZeroSettings) -> list[int]:
    """Sizes of the parameters that stay gathered at stage 3."""
    return [numels[place] for place in persistent_places(numels, zero)]


def persistent_places(numels: Sequence[int], zero: ZeroSettings) -> list[int]:
    """Which parameters stay gathered at stage 3 (parameter_offload.py,
    mark_persistent_parameters)."""
    kept: list[int] = []
    total = 0
    for place, n in enumerate(numels):
        if n <= zero.param_persistence_threshold and n + total <= zero.model_persistence_threshold:
            kept.append(place)
            total += n
    return kept


def cut_order(modules: Sequence[str]) -> Iterator[int | None]:
    """When `deepspeed.zero.Init` meets parameters, given by the modules that hold them: `None` as
    each of them is made, its index as it is cut, which is when its module and those inside it are
    whole (partition_parameters.py, _post_init_method). The model itself is "", and everything is
    inside it."""
    unfinished: list[list[int]] = []
    for index, module in enumerate(modules):
        while unfinished and (above := modules[unfinished[-1][0]]) and not f"{module}.".startswith(f"{above}."):
            yield from unfinished.pop()
        if unfinished and modules[unfinished[-1][0]] == module:
            unfinished[-1].append(index)
        else:
            unfinished.append([index])
        yield None
    while unfinished:
        yield from unfinished.pop()
