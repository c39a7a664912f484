"""How many values a lower precision cannot hold: of weights, gradients and updates, those that a
cast makes zero or infinite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bf16prof.step_records import CastShares
from bf16prof.vocabulary import STRICT, Size

if TYPE_CHECKING:
    from torch import Tensor

CAST_TO: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""The precisions, and torch's names of them."""


@dataclass(frozen=True)
class Casts:
    """Over so many finite values: how many that are not zero become zero, and how many become
    infinite, by the precision."""

    __pydantic_config__ = STRICT

    values: Size = 0
    zero: dict[str, Size] = field(default_factory=dict)
    infinite: dict[str, Size] = field(default_factory=dict)

    def __add__(self, other: Casts) -> Casts:
        return Casts(self.values + other.values, _sum(self.zero, other.zero), _sum(self.infinite, other.infinite))

    @property
    def shares(self) -> CastShares | None:
        """The same as shares; `None` of no values."""
        if not self.values:
            return None
        zero, infinite = ({name: count / self.values for name, count in counts.items()} for counts in (self.zero, self.infinite))
        return CastShares(self.values, zero, infinite)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in CAST_TO}


def counted(values: Tensor) -> Casts:
    """What casts make of these values, which come in float64; those that are not finite are left
    out."""
    import torch

    known = values[values.isfinite()]
    zero, infinite = {}, {}
    for name, of_torch in CAST_TO.items():
        cast = known.to(getattr(torch, of_torch))
        zero[name] = int(((cast == 0) & (known != 0)).sum())
        infinite[name] = int(cast.isinf().sum())
    return Casts(known.numel(), zero, infinite)
