"""What one format says of a run, and how exactly it says it.

A log that prints 25.74 GB does not say a number of bytes but an interval; a `Reading` keeps both ends, and nothing wider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from bf16prof.records import Item, StepRecord

GIB = 2**30
NUMBER = r"\d{1,15}(?:\.\d{1,15})?"
"""A plain decimal number in a log, as a regular expression: no sign, no exponent, no endless digits."""


@dataclass(frozen=True)
class Reading:
    """Bytes as they were logged: the true number is at most `rounding` away from `bytes`."""

    bytes: int
    rounding: int = 0

    @property
    def low(self) -> int:
        """The least that it can be."""
        return max(0, self.bytes - self.rounding)

    @property
    def high(self) -> int:
        """The most that it can be."""
        return self.bytes + self.rounding

    @classmethod
    def between(cls, low: int, high: int) -> Reading:
        """The integers from `low` to `high`; of an even number of them one is left out, so that there is a middle."""
        middle = (low + high) // 2
        return cls(middle, (high - low) // 2)

    def at_least(self, other: Reading) -> Reading:
        """The same quantity, known to be no lower than another one; as it is where the two contradict each other."""
        return self if other.low <= self.low or other.low > self.high else Reading.between(other.low, self.high)


def rounded(text: str, unit: int, decimals: int) -> Reading:
    """A number that was rounded to so many decimals, in bytes. At either end at most one byte is missing that may have been meant."""
    half = Fraction(1, 2 * 10**decimals)
    return Reading(round(Fraction(text) * unit), math.floor(half * unit - Fraction(1, 2)))


def highest(readings: list[Reading]) -> Reading | None:
    """The largest of several readings: as low as none of them allows it to be lower."""
    if not readings:
        return None
    return Reading.between(max(r.low for r in readings), max(r.high for r in readings))


@dataclass(frozen=True)
class Finding:
    """What a format says of a run.

    * `readings`: bytes by the reconciler's names of quantities. `facts`: other fields of a `MemoryRecord` by name.
    * `ranks`: so many ranks there are at least. `config`: the DeepSpeed JSON that the log names.
    """

    format: str
    readings: Mapping[str, Reading] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()
    items: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()
    ranks: int = 0
    config: str | None = None


class Reader(Protocol):
    """Collects what one format says, over all files of a run."""

    def finding(self) -> Finding | None:
        """What was said; `None` if nothing was. Raises `ValueError` when the files contradict each other."""
        ...


class LineReader(Reader, Protocol):
    """A reader of lines in a text that also holds others."""

    format: str

    def line(self, text: str) -> int:
        """Read one line; how many lines it explains: none, itself, or itself and the line before."""
        ...


def known(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
