"""One reading of each quantity from all that say it: the most exact of those that are the quantity
itself; bounds where they prove more.

* A run that died proves of its peaks that they are at least what was seen: every other reading of a
  peak is a lower bound then.
* A line that resets torch's peak counter makes of the peaks that other lines print peaks since
  then: the highest of them all is the run's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from bf16prof.imports.finding import Finding, Reading, highest

GROWING = ("allocated_bytes", "peak_allocated_bytes", "run_peak_allocated_bytes", "reserved_bytes")
"""Quantities of one run, none of which is larger than the next."""

WHOLE_RUN = "run_peak_allocated_bytes"
_LARGEST = 2**60
"""Bytes that no GPU has: a damaged number."""

_ENDED_BY_DEATH = ("peak_allocated_bytes", WHOLE_RUN, "reserved_bytes", "device_bytes")


def merged(findings: Sequence[Finding]) -> tuple[dict[str, Reading], list[str]]:
    """The readings by quantity, and what of them contradicts itself."""
    died = any(finding.failure for finding in findings)
    resets = any(finding.resets_peaks for finding in findings)
    said: dict[str, list[tuple[Reading, Finding]]] = {}
    for finding in findings:
        for name, reading in finding.readings.items():
            if reading.top >= _LARGEST:
                continue
            is_open = died and (name in _ENDED_BY_DEATH)
            said.setdefault(name, []).append((reading.as_floor() if is_open else reading, finding))
    readings, contradictions = {}, []
    for name, found in said.items():
        readings[name], against = _one(name, found, is_maximum=resets and name == WHOLE_RUN)
        contradictions += against
    if resets and WHOLE_RUN in readings:
        phases = [reading for name, reading in readings.items() if name.startswith("phases.") and name.endswith(".peak_bytes")]
        most = highest([readings[WHOLE_RUN], *phases])
        if most and most.low > readings[WHOLE_RUN].top:
            readings[WHOLE_RUN] = most
    return readings, contradictions + _shrinking(readings)


def _one(name: str, found: Sequence[tuple[Reading, Finding]], *, is_maximum: bool) -> tuple[Reading, list[str]]:
    """The reading of a quantity, and who contradicts it. `is_maximum`: none is the quantity, which
    is the highest of them."""
    exact = [pair for pair in found if not pair[0].is_floor]
    floor = highest([reading for reading, _ in found if reading.is_floor])
    if is_maximum or not exact:
        return highest([reading for reading, _ in found]) or found[0][0], []
    best, by = min(exact, key=lambda pair: pair[0].rounding)
    against = [
        f"{name}: {best.bytes} by {by.format}, {reading.bytes} by {finding.format}"
        for reading, finding in found
        if max(best.low, reading.low) > min(best.high, reading.high)
    ]
    return (floor if floor and floor.low > best.top else best), against


def _shrinking(readings: Mapping[str, Reading]) -> list[str]:
    return [
        f"{large} is {readings[large].bytes}, and {small} {readings[small].bytes}"
        for small, large in itertools.combinations([name for name in GROWING if name in readings], 2)
        if readings[small].low > readings[large].high
    ]
