"""Partition arithmetic against DeepSpeed's own functions, called without ranks, and against what
must hold for any sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from bf16prof.closed_form.layout import cut_order, flat_numel, flat_spans, partition_numels, persistent, sub_groups, touched_numel
from bf16prof.profiles.schema import ZeroSettings

pytestmark = DEEPSPEED_WARNINGS

NUMELS = st.lists(st.integers(1, 5000), min_size=1, max_size=30)
WORLDS = st.integers(1, 130)
ELEMENT = {2: torch.bfloat16, 4: torch.float32}


def deepspeed_flat_group(
    numels: list[int], world: int, zero: ZeroSettings, element_bytes: int
) -> tuple[list[torch.Tensor], list[int], int]:
    """The parameters in flat order, the padding after each, and the flat length, by
    stage_1_and_2.py's own functions on meta tensors."""
    from deepspeed.runtime.utils import align_dense_tensors
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    tensors: Any = [torch.empty(n, dtype=ELEMENT[element_bytes], device="meta") for n in numels]
    if zero.round_robin_gradients:
        tensors, _ = DeepSpeedZeroOptimizer._round_robin_reorder(SimpleNamespace(), tensors, world)
    boundary = 16 // element_bytes if zero.parameter_alignment else 1
    padding, end = [], 0
    for index, tensor in enumerate(tensors):
        end += tensor.numel()
        padding.append(0 if index == len(tensors) - 1 else -end % boundary)
        end += padding[-1]
    pads = [torch.empty(p, device="meta") for p in padding if p]
    aligned = align_dense_tensors([*tensors, *pads], 2 * world)
    return tensors, padding, sum(t.numel() for t in aligned)


@given(NUMELS, WORLDS, st.booleans(), st.booleans(), st.sampled_from([2, 4]))
@settings(deadline=None, max_examples=50)
def test_the_flat_buffer_is_as_long_as_deepspeeds(numels: list[int], world: int, robin: bool, align: bool, element_bytes: int) -> None:
    zero = ZeroSettings(round_robin_gradients=robin, parameter_alignment=align)

    _, _, length = deepspeed_flat_group(numels, world, zero, element_bytes)

    assert flat_numel(numels, world, zero, element_bytes) == length


@given(NUMELS, WORLDS, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=50)
def test_a_partition_touches_what_deepspeed_assigns_to_it(numels: list[int], world: int, robin: bool, align: bool) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # GIVEN a flat group cut into equal partitions
    zero = ZeroSettings(round_robin_gradients=robin, parameter_alignment=align)
    tensors, padding, length = deepspeed_flat_group(numels, world, zero, 2)
    own = length // world

    # WHEN DeepSpeed says which parameters lie in each rank's partition
    inside = [DeepSpeedZeroOptimizer.get_partition_info(SimpleNamespace(), tensors, own, rank, padding)[0] for rank in range(world)]

    # THEN the fullest partition is the one we count
    assert touched_numel(flat_spans(numels, world, zero, 2), own) == max(sum(t.numel() for t in mine) for mine in inside)


def test_a_parameter_that_ends_where_a_partition_ends_does_not_touch_the_next() -> None:
    assert touched_numel([(0, 7), (7, 8), (8, 16)], 8) == 8
    assert touched_numel([(0, 7), (7, 9), (9, 16)], 8) == 9


@given(NUMELS, st.integers(0, 60_000))
@settings(deadline=None, max_examples=50)
def test_sub_groups_are_cut_where_deepspeed_cuts_them(partitions: list[int], size: int) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    params = [SimpleNamespace(partition_numel=lambda n=n: n) for n in partitions]

    groups = DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(SimpleNamespace(sub_group_size=size), params)

    assert sub_groups(partitions, size) == [sum(p.partition_numel() for p in group) for group in groups]


@given(NUMELS, st.integers(0, 6000), st.integers(0, 30_000))
@settings(deadline=None, max_examples=50)
def test_the_persistent_parameters_are_those_that_deepspeed_marks(numels: list[int], threshold: int, model_threshold: int) -> None:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    params = [(str(i), SimpleNamespace(ds_numel=n)) for i, n in enumerate(numels)]
    offload = SimpleNamespace(module=SimpleNamespace(named_parameters=lambda recurse: params))

    with mock.patch("deepspeed.runtime.zero.parameter_offload.print_rank_0"):  # it asks for the rank, and there is none
        marked = DeepSpeedZeRoOffload.mark_persistent_parameters(offload, threshold, model_threshold)

    zero = ZeroSettings(param_persistence_threshold=threshold, model_persistence_threshold=model_threshold)
    assert persistent(numels, zero) == [p.ds_numel for p in marked]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 64])
def test_stage_3_partitions_are_as_large_as_deepspeeds(world: int) -> None:
    from deepspeed.runtime.zero import partition_parameters

    # GIVEN parameters that have been converted as zero.Init does it, on a rank of `world`
    numels = [1, 2, world, world + 1, 12 * 31, 4097]
    init = SimpleNamespace(_partition_world_size=lambda _param: world)
    init._padding_size = lambda param: partition_parameters.Init._padding_size(init, param)

    # WHEN DeepSpeed aligns each of them and divides by the ranks, as _partition_param does
    sizes = [partition_parameters.Init._aligned_size(init, SimpleNamespace(ds_numel=n)) // world for n in numels]

    # THEN
    assert partition_numels(numels, world) == sizes


@settings(deadline=None)
@given(NUMELS, WORLDS)
def test_partitions_hold_everything_and_waste_less_than_one_element_per_rank_and_parameter(numels: list[int], world: int) -> None:
    for n, share in zip(numels, partition_numels(numels, world), strict=True):
        assert n <= share * world < n + world


@settings(deadline=None)
@given(NUMELS, WORLDS, st.booleans(), st.booleans(), st.sampled_from([2, 4]))
def test_padding_of_the_flat_buffer_is_small_and_it_divides(numels: list[int], world: int, robin: bool, align: bool, b: int) -> None:
    zero = ZeroSettings(round_robin_gradients=robin, parameter_alignment=align)
    length = flat_numel(numels, world, zero, b)

    assert length >= sum(numels)
    assert length % (2 * world) == 0
    assert length - sum(numels) < 2 * world + (16 // b * len(numels) if align else 0)
    spans = flat_spans(numels, world, zero, b)
    assert sorted(end - start for start, end in spans) == sorted(numels)
    assert all(left[1] <= right[0] for left, right in pairwise(spans)), "parameters do not overlap"


@settings(deadline=None)
@given(NUMELS, st.integers(0, 60_000))
def test_sub_groups_add_up_and_only_the_last_may_be_small(partitions: list[int], size: int) -> None:
    groups = sub_groups(partitions, size)

    assert sum(groups) == sum(partitions)
    assert all(group >= size for group in groups[:-1])


def test_published_partition_sizes_of_the_example() -> None:
    """Found by replaying DeepSpeed itself (zero/stage3.py) on four ranks."""
    from jobs import profile

    from bf16prof.models.shapes import inventory

    expected = {
        50257: (6_858_007_633, 1_714_501_909, [1_008_540_672, 705_961_237]),
        50000: (6_855_902_032, 1_713_975_508, [1_008_277_504, 705_698_004]),
    }
    for vocabulary, (total, own, groups) in expected.items():
        numels = [p.numel for p in inventory(profile("deepspeed-bf16-example", model__vocab_size=vocabulary).model)]
        assert (len(numels), sum(numels)) == (388, total)
        partitions = partition_numels(numels, 4)
        assert sum(partitions) == own
        assert sub_groups(partitions, 1_000_000_000) == groups


class Watched(torch.nn.Module):
    """A module that says when its parameters are made, and when it is whole, as
    `deepspeed.zero.Init` sees it: after its `__init__`."""

    def __init__(self, name: str, content: Sequence[Any], seen: list[Any]) -> None:
        super().__init__()
        for place, each in enumerate(content):
            if isinstance(each, str):
                self.register_parameter(each, torch.nn.Parameter(torch.zeros(1)))
                seen.append(None)
            else:
                inner = f"{name}.{place}" if name else str(place)
                self.add_module(str(place), Watched(inner, each, seen))
        seen += [f"{name}.{key}" if name else key for key, _ in self.named_parameters(recurse=False)]


@pytest.mark.parametrize(
    "content",
    [
        ("a", "b"),
        (("a", "b"), ("c",)),
        ("a", ("b", ("c", "d"), "e"), "f"),
        (("a", ("b",), ("c",)), "d", ("e",)),
        ((("a",), ("b",)), ("c", ("d", ("e", "f")))),
    ],
)
def test_parameters_are_cut_when_their_module_is_whole(content: Sequence[Any]) -> None:
    seen: list[Any] = []
    made: list[str] = []

    def names(prefix: str, inside: Sequence[Any]) -> None:
        for place, each in enumerate(inside):
            if isinstance(each, str):
                made.append(f"{prefix}{each}")
            else:
                names(f"{prefix}{place}.", each)

    names("", content)
    Watched("", content, seen)

    found = list(cut_order([name.rpartition(".")[0] for name in made]))
    assert [None if index is None else made[index] for index in found] == seen
