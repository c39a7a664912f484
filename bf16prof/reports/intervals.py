"""Intervals of a mean over few values: Student's t, without a library.

The distribution of t with a whole number of degrees of freedom is a finite sum (Abramowitz and
Stegun, 26.7.3 and 26.7.4); its quantile is found by halving.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values and half the width of its confidence interval, which one value has
    not."""

    mean: float
    half_width: float | None
    count: int

    def text(self, digits: int = 3) -> str:
        """`2.345 ± 0.012`, or the mean alone."""
        return f"{self.mean:z.{digits}f}" + ("" if self.half_width is None else f" ± {self.half_width:.{digits}f}")

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean differs from 0 by more than the interval."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean and its two-sided interval by Student's t: half the width is t s / sqrt(n). Raises
    `ValueError` where there is no value."""
    if not values:
        raise ValueError("no values")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    return Interval(mean, t_quantile(confidence, count - 1) * statistics.stdev(values) / math.sqrt(count), count)


@cache
def t_quantile(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with this probability (0 < confidence < 1), with so many degrees
    of freedom (1 or more)."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The probability that |T| < sqrt(freedom) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 if odd else 1, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
