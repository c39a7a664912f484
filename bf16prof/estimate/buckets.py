"""Which parameters travel together: the reduce buckets of gradients and ZeRO-3's launches of gathers. All counts are elements.

They do not depend on the recipe but for one thing, whether autocast casts some parameters (`mixed`), and are kept for the next cell of a
grid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bf16prof.estimate.gathering import gathering
from bf16prof.estimate.layout import ceil_div
from bf16prof.models.shapes import inventory
from bf16prof.profiles.models import ModelSettings
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.records import Phase


@dataclass(frozen=True)
class Launch:
    """Parameters that are gathered together: how many, and their elements that autocast casts and those that it does not."""

    parameters: int
    cast: int
    other: int


@dataclass(frozen=True)
class Buckets:
    """All reduce buckets of a model: how many, and the elements in those that autocast casts and in the others."""

    count: int
    cast: int
    other: int


def padded(numel: int, pieces: int) -> int:
    """Elements of a parameter that is cut into equal pieces."""
    return ceil_div(numel, pieces) * pieces


@functools.cache
def buckets(model: ModelSettings, bucket_size: int, mixed: bool) -> tuple[tuple[bool, tuple[int, ...]], ...]:
    """The reduce buckets of stages 1 to 3: whether autocast casts them, and their parameters as positions in the inventory.

    Gradients arrive from the last parameter to the first; a bucket is reduced before the one that it has no room for, and there is one per
    dtype (`zero/stage_1_and_2.py` and `zero/stage3.py`, reduce_independent_p_g_buckets_and_remove_grads).
    """
    found: list[tuple[bool, list[int]]] = []
    open_: dict[bool, tuple[list[int], int]] = {}
    specs = inventory(model)
    for index in reversed(range(len(specs))):
        is_cast = mixed and specs[index].cast_by_autocast
        members, room = open_.get(is_cast, ([], 0))
        if not members or specs[index].numel > room:
            members, room = [], bucket_size
            found.append((is_cast, members))
        members.append(index)
        open_[is_cast] = members, room - specs[index].numel
    return tuple((is_cast, tuple(members)) for is_cast, members in found)


@functools.cache
def bucket_numels(model: ModelSettings, bucket_size: int, mixed: bool, pieces: int) -> Buckets:
    """The buckets' elements, each parameter padded to equal pieces."""
    specs, found = inventory(model), buckets(model, bucket_size, mixed)
    sizes = {cast: sum(padded(specs[i].numel, pieces) for c, members in found if c is cast for i in members) for cast in (True, False)}
    return Buckets(len(found), sizes[True], sizes[False])


@functools.cache
def fetched_numels(
    model: ModelSettings, checkpointing: bool, zero: ZeroSettings, pieces: int, mixed: bool
) -> tuple[tuple[Phase, tuple[Launch, ...]], ...]:
    """ZeRO-3's launches in forward and in backward of one micro-step."""
    specs, launches = inventory(model), gathering(model, checkpointing, zero)
    sizes = [padded(spec.numel, pieces) for spec in specs]
    cast = [size if mixed and spec.cast_by_autocast else 0 for size, spec in zip(sizes, specs, strict=True)]

    def launch(group: tuple[int, ...]) -> Launch:
        inside = sum(cast[i] for i in group)
        return Launch(len(group), inside, sum(sizes[i] for i in group) - inside)

    phases = ((Phase.FORWARD, launches.forward), (Phase.BACKWARD, launches.backward))
    return tuple((phase, tuple(launch(group) for group in groups)) for phase, groups in phases)
