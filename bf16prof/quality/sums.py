"""Lost updates and effective descent quality as sums, which add up over tensors, layers and
ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from bf16prof.vocabulary import STRICT, Size

SAMPLE = 2**16
"""At most so many elements of each parameter (or of the part of it that a rank updates) are looked
at."""

Square = Annotated[float, Interval(ge=0)]


@dataclass(frozen=True)
class Sums:
    """Over `elements` that were looked at and finite: how many updates were intended (not zero),
    how many of those changed no stored value (`lost`), the inner product of the intended update
    with the one that took effect (`projected`), and of the intended one with itself (`square`).
    """

    __pydantic_config__ = STRICT

    elements: Size = 0
    intended: Size = 0
    lost: Size = 0
    projected: float = 0.0
    square: Square = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.elements + other.elements,
            self.intended + other.intended,
            self.lost + other.lost,
            self.projected + other.projected,
            self.square + other.square,
        )

    @property
    def lost_updates(self) -> float | None:
        """The share of intended updates that changed no stored value; `None` where none was
        intended."""
        return self.lost / self.intended if self.intended else None

    @property
    def edq(self) -> float | None:
        """Effective descent quality as a share: 1 when the intended update took effect; `None`
        where none was intended.

        Collage's own (arXiv 2405.03637) is <intended / |intended|, effective>; this is that over
        |intended|. It can exceed 1: rounding may also carry a value further than was intended.
        """
        return self.projected / self.square if self.square else None


def total(sums: Iterable[Sums]) -> Sums:
    """All of them together."""
    return sum(sums, Sums())
