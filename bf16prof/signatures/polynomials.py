"""Numbers as exact polynomials in batch and length: found from some points, and kept only if all
other points confirm them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

Point = tuple[int, int]
"""Sequences of a micro-batch, and their length."""

POWERS = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2))
"""Of batch and length in the terms that there are: sizes of tensors are linear in the batch, and at
most quadratic in the length."""


@dataclass(frozen=True)
class Polynomial:
    """Whole coefficients of the terms in `POWERS`, and what their sum is divided by."""

    terms: tuple[int, ...]
    divisor: int = 1

    def __call__(self, point: Point) -> int | None:
        """The number at a point; `None` where it is no whole one, which no size is."""
        total = sum(map(operator.mul, self.terms, _powers_at(point)))
        return None if total % self.divisor else total // self.divisor


@functools.lru_cache(maxsize=64)
def _powers_at(point: Point) -> tuple[int, ...]:
    """Every term without its coefficient."""
    batch, length = point
    return tuple(batch**b * length**s for b, s in POWERS)


class Fit:
    """Polynomials through points: as many of them as it takes decide, the others confirm."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = points
        in_batch, in_length = (len({point[axis] for point in points}) for axis in (0, 1))
        self._powers = [power for power in POWERS if power[0] < in_batch and power[1] < in_length]
        self._deciding, self._inverse = _inverse([[Fraction(b**i * s**j) for i, j in self._powers] for b, s in points])

    @property
    def is_confirmed(self) -> bool:
        """Whether the points decide all terms, and at least one is left over to confirm them."""
        return len(self._deciding) == len(self._powers) < len(self._points)

    def through(self, values: Sequence[int]) -> Polynomial | None:
        """The polynomial with these values at the points, if there is one."""
        if len(set(values)) == 1:
            return Polynomial((values[0],))
        given = [values[place] for place in self._deciding]
        found = [sum((weight * value for weight, value in zip(row, given, strict=True)), Fraction(0)) for row in self._inverse]
        divisor = lcm(*(each.denominator for each in found))
        known = {power: int(each * divisor) for power, each in zip(self._powers, found, strict=True)}
        polynomial = Polynomial(tuple(known.get(power, 0) for power in POWERS), divisor)
        agrees = all(polynomial(point) == value for point, value in zip(self._points, values, strict=True))
        return polynomial if agrees else None


def _inverse(rows: Sequence[Sequence[Fraction]]) -> tuple[list[int], list[list[Fraction]]]:
    """The first rows that no others before them make up, and the inverse of the matrix of those
    (none if they are too few)."""
    count = len(rows[0])
    chosen: list[int] = []
    reduced: list[list[Fraction]] = []
    for place, row in enumerate(rows):
        left = [*row, *(Fraction(int(index == len(chosen))) for index in range(count))]
        for other in reduced:
            pivot = next(index for index, value in enumerate(other) if value)
            factor = left[pivot] / other[pivot]
            left = [value - factor * known for value, known in zip(left, other, strict=True)]
        if any(left[:count]) and len(chosen) < count:
            chosen.append(place)
            reduced.append(left)
    if len(chosen) < count:
        return chosen, []
    for place in reversed(range(count)):
        row = reduced[place]
        pivot = next(index for index, value in enumerate(row) if value)
        reduced[place] = row = [value / row[pivot] for value in row]
        for above in range(place):
            factor = reduced[above][pivot]
            reduced[above] = [value - factor * known for value, known in zip(reduced[above], row, strict=True)]
    order = sorted(range(count), key=lambda place: next(index for index, value in enumerate(reduced[place]) if value))
    return chosen, [reduced[place][count:] for place in order]
