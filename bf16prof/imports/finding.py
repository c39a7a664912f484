"""What one format says of a run, and how exactly it says it.

A log that prints 25.74 GB does not say a number of bytes but an interval; a `Reading` keeps both
ends, and nothing wider.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol

from bf16prof.records import Item, OutOfMemory
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import Phase

GIB, MIB = 2**30, 2**20
_ENDLESS = 2**62
NUMBER = r"\d{1,15}(?:\.\d{1,15})?"
"""A plain decimal number in a log, as a regular expression: no sign, no exponent, no endless
digits."""


@dataclass(frozen=True)
class Reading:
    """Bytes as they were logged: the logged number is at most `rounding` away from `bytes`.

    `is_floor`: the log proves this much and says nothing of what is above it; else it is the
    quantity itself.
    """

    bytes: int
    rounding: int = 0
    is_floor: bool = False

    @property
    def low(self) -> int:
        """The least that it can be."""
        return max(0, self.bytes - self.rounding)

    @property
    def top(self) -> int:
        """The most that the logged number can be."""
        return self.bytes + self.rounding

    @property
    def high(self) -> int:
        """The most that the quantity can be."""
        return _ENDLESS if self.is_floor else self.top

    @classmethod
    def between(cls, low: int, high: int, *, is_floor: bool = False) -> Reading:
        """The integers from `low` to `high`, and one below where they have no middle: none that may
        be meant is left out."""
        middle = (low + high) // 2
        return cls(middle, high - middle, is_floor)

    def no_lower_than(self, other: Reading) -> Reading:
        """The same quantity, known to be no lower than another one; as it is where the two
        contradict each other."""
        if other.low <= self.low or other.low > self.top:
            return self
        return Reading.between(other.low, self.top, is_floor=self.is_floor)

    def as_floor(self) -> Reading:
        """The same as a lower bound."""
        return replace(self, is_floor=True)


@functools.lru_cache(maxsize=4096)
def rounded(text: str, unit: int, decimals: int) -> Reading:
    """A number that was rounded to so many decimals, in bytes. No byte that may have been meant is
    left out; at one end there is one more where the number itself is no whole number of bytes."""
    number, half = Fraction(text) * unit, Fraction(unit, 2 * 10**decimals)
    middle = round(number)
    return Reading(middle, max(math.floor(number + half) - middle, middle - math.ceil(number - half)))


def highest(readings: Sequence[Reading]) -> Reading | None:
    """The largest of several readings: as low as none of them allows it to be lower. A lower bound
    if one of them is."""
    if not readings:
        return None
    is_floor = any(r.is_floor for r in readings)
    return Reading.between(max(r.low for r in readings), max(r.top for r in readings), is_floor=is_floor)


def total(readings: Sequence[Reading]) -> Reading:
    """The sum of several readings, none of which is of the others' bytes."""
    return Reading(sum(r.bytes for r in readings), sum(r.rounding for r in readings), any(r.is_floor for r in readings))


@dataclass(frozen=True)
class Rates:
    """Speed that a log gives in other units than seconds per step; what is missing may be known
    from elsewhere.

    * `samples_per_s`: of the whole job, by step. `micro_step_s`: seconds of each micro-step, in
      their order.
    * `mean_step_s`: a mean over the whole run, which holds more than the steps.
    """

    samples_per_s: Mapping[int, float] = field(default_factory=dict)
    micro_step_s: tuple[float, ...] = ()
    mean_step_s: float | None = None


@dataclass(frozen=True)
class Finding:
    """What a format says of a run.

    * `readings`: bytes by the reconciler's names of quantities. `facts`: other fields of a
      `MemoryRecord` by name.
    * `ranks`: so many ranks there are at least. `config`: the DeepSpeed JSON that the log names.
    * `said`: what the log says of the case and the workload, by the names of `SAID`.
    * `resets_peaks`: printing it resets torch's peak counter, so that a peak that another line
      prints is one since then.
    * `open_phase`: the phase of training that the last line says has begun, and no line has ended.
    * `failure`: one line on how the run died; empty if nothing says that it did. `shortage`: the
      numbers of an out-of-memory message.
    """

    format: str
    readings: Mapping[str, Reading] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[StepRecord, ...] = ()
    items: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()
    ranks: int = 0
    config: str | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    rates: Rates = Rates()
    resets_peaks: bool = False
    open_phase: Phase | None = None
    failure: str = ""
    shortage: OutOfMemory | None = None


SAID = ("world_size", "zero_stage", "micro_batch_size", "gradient_accumulation_steps", "train_batch_size", "deepspeed")
"""What a log may say of its case: whole numbers, and under `deepspeed` the whole JSON."""


class Reader(Protocol):
    """Collects what one format says, over all files of a run."""

    def finding(self) -> Finding | None:
        """What was said; `None` if nothing was. Raises `ValueError` when the files contradict each
        other."""
        ...


class MarkedReader(Reader, Protocol):
    """A reader of lines in a text that also holds others."""

    format: str

    @property
    def marks(self) -> tuple[str, ...]:
        """One of them is in every line that concerns it, letters in any case."""
        ...


class LineReader(MarkedReader, Protocol):
    """One that is told the text of a line alone. No line may concern it only for what came before
    (see `_TextReader.is_open` in `files.py`)."""

    def line(self, text: str) -> int:
        """Read one line; how many lines it explains: none, itself, or itself and the line
        before."""
        ...


def known(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
