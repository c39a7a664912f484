"""Join records of the same case: every prediction against the measurement, with signed errors.

The measurement is the reference where there is one (a run of ours, or an imported one); without it
predictions stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.errors import InputError, ToleranceExceeded
from bf16prof.records import Case, MemoryRecord
from bf16prof.vocabulary import Component, Device, Phase, Source

REFERENCES = (Source.MEASURE, Source.IMPORT)

QUANTITIES = (
    "allocated_bytes", "peak_allocated_bytes", "run_peak_allocated_bytes", "reserved_bytes", "fragmentation_bytes", "device_bytes",
    "host_bytes", "step_time_s",
)  # fmt: skip

NAMES = (
    *QUANTITIES,
    *(f"components.{component}" for component in Component),
    *(f"phases.{phase}.{instant}_bytes" for phase in Phase for instant in ("peak", "end")),
)
"""Everything that is compared, in the order in which it is listed."""

WATCHED = ("allocated_bytes", "peak_allocated_bytes", "run_peak_allocated_bytes", "reserved_bytes")
"""What a tolerance is about; lower bounds of phases count as well, as a log that ends early knows
nothing else."""


@dataclass(frozen=True)
class Comparison:
    """One quantity of one case by source. `errors` are signed and relative: (prediction - measured)
    / measured.

    `rounding`: the measurement was printed rounded, and may be so many bytes higher or lower.
    `at_least`: the measurement is a lower bound. A prediction that is not below it is consistent
    with it, and has no error (`None`).
    """

    case: Case
    device: Device
    quantity: str
    values: dict[Source, float | int]
    errors: dict[Source, float | None]
    rounding: int = 0
    at_least: bool = False

    def is_consistent(self, source: Source) -> bool:
        """Whether a prediction agrees with a lower bound, as far as that was printed."""
        truth = self._truth
        return self.at_least and truth is not None and source in self.errors and self.values[source] >= truth - self.rounding

    @property
    def _truth(self) -> float | int | None:
        return next((self.values[s] for s in REFERENCES if s in self.values), None)

    def error_beyond_rounding(self, source: Source) -> float | None:
        """The error as far as rounding does not explain it; 0 for a prediction that may be what was
        rounded."""
        error, truth = self.errors.get(source), self._truth
        if not error or not truth:
            return error
        return math.copysign(max(0.0, abs(error) - self.rounding / truth), error)


def reconcile(records: Sequence[MemoryRecord]) -> list[Comparison]:
    """Comparisons of all quantities that at least one source knows, in the order in which the cases
    first appear.

    Quantities are those of `QUANTITIES`, then `components.<name>` and `phases.<name>.peak_bytes` /
    `.end_bytes`.
    """
    groups: dict[tuple[Case, Device], dict[Source, MemoryRecord]] = {}
    for record in records:
        groups.setdefault((record.case, record.device), {})[record.source] = record
    return [comparison for (case, device), by_source in groups.items() for comparison in _compare(case, device, by_source)]


def check_tolerance(comparisons: Sequence[Comparison], tolerance: float) -> None:
    """Raise `ToleranceExceeded` when a prediction of allocated or peak memory misses by more than
    `tolerance` (0.05 = 5 %).

    What the rounding of a printed measurement explains is no miss; of a lower bound only a
    prediction below it is one. Raises `InputError` when there is nothing to hold it against: no
    measurement, or none of these quantities predicted.
    """
    watched = [c for c in comparisons if c.quantity in WATCHED or (c.at_least and c.quantity.endswith("peak_bytes"))]
    errors = [
        (abs(comparison.error_beyond_rounding(source) or 0.0), comparison, source, error)
        for comparison in watched
        for source, error in comparison.errors.items()
        if error is not None and not _is_a_replay(comparison, source)
    ]
    if not errors and not any(comparison.is_consistent(source) for comparison in watched for source in comparison.errors):
        raise InputError("--fail-over: there is no measurement of a predicted memory to compare with")
    worst = [row for row in errors if row[0] > tolerance]
    if worst:
        _, comparison, source, error = max(worst, key=lambda row: row[0])
        off = "below what the log proves" if comparison.at_least else "off"
        raise ToleranceExceeded(
            f"{source} of {comparison.quantity} in {comparison.case.label} is {error:+.2%} {off}, more than the {tolerance:.2%} allowed",
            hint=f"{len(worst)} of the compared quantities are outside the tolerance",
        )


def _is_a_replay(comparison: Comparison, source: Source) -> bool:
    """Whether the closed form replayed the allocator for a quantity: good enough to judge with a
    margin, no claim about bytes."""
    return source is Source.ESTIMATE and comparison.quantity == "reserved_bytes"


def _flatten(record: MemoryRecord) -> dict[str, float | int]:
    values: dict[str, float | int | None] = {name: getattr(record, name) for name in QUANTITIES}
    if record.components:
        values |= {f"components.{c}": record.components.get(c, 0) for c in Component}
    for phase in Phase:
        memory = record.phases.get(phase)
        if memory is not None:
            values[f"phases.{phase}.peak_bytes"] = memory.peak_bytes
            values[f"phases.{phase}.end_bytes"] = memory.end_bytes
    return {name: value for name, value in values.items() if value is not None}


def _compare(case: Case, device: Device, by_source: dict[Source, MemoryRecord]) -> list[Comparison]:
    reference = next((s for s in REFERENCES if s in by_source), None)
    rounding, bounds = (by_source[reference].rounding, by_source[reference].at_least) if reference else ({}, ())
    known = {source: _flatten(record) for source, record in by_source.items()}
    floors = {source: record.at_least for source, record in by_source.items()}
    out = []
    for name in NAMES:
        values = {source: flat[name] for source, flat in known.items() if name in flat}
        truth, width = values.get(reference) if reference else None, rounding.get(name, 0)
        is_bound = truth is not None and name in bounds
        errors = {
            s: None if truth is not None and (v >= truth - width if is_bound else name in floors[s] and v <= truth) else _relative(v, truth)
            for s, v in values.items()
            if s not in REFERENCES
        }
        if any(values.values()):
            out.append(Comparison(case, device, name, values, errors, width, is_bound))
    return out


def _relative(value: float, truth: float | None) -> float | None:
    if truth is None:
        return None
    if truth == 0:
        return 0.0 if value == 0 else None
    return (value - truth) / truth
