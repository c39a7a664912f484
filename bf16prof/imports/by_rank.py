"""One run that several ranks speak of: each has a reader of its own, and the one that holds most is
told, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bf16prof.imports.finding import Finding, LineReader, Reading
from bf16prof.imports.text import LogLine

MOST_SPEAKERS = 65_536
"""So many ranks or hosts are told apart; those of a file that is no log could be one a line."""

_WORST = ("run_peak_allocated_bytes", "peak_allocated_bytes", "allocated_bytes", "reserved_bytes", "device_bytes")
"""By what the rank that holds most is found: the first that any of them says."""


class ByRank:
    """A reader of lines for each speaker."""

    is_open = False

    def __init__(self, make: Callable[[], LineReader]) -> None:
        self._make = make
        self._readers: dict[str, LineReader] = {}
        self.format, self.marks = make().format, make().marks

    def line(self, line: LogLine) -> int:
        """Read one line; how many it explains."""
        reader = self._readers.get(line.speaker)
        if reader is not None:
            return reader.line(line.text)
        reader = self._make()
        count = reader.line(line.text)
        if len(self._readers) < MOST_SPEAKERS:
            self._readers[line.speaker] = reader
        return count

    def finding(self) -> Finding | None:
        """What the one that holds most says; the slowest where none says anything of memory."""
        found = {speaker: finding for speaker, reader in self._readers.items() if (finding := reader.finding())}
        if len(found) < 2:
            return next(iter(found.values()), None)
        worst = max(found, key=lambda speaker: _held(found[speaker]))
        ranks = max(
            *(finding.ranks for finding in found.values()), *(1 + rank for s in found if (rank := LogLine("", s).rank) is not None), 0
        )
        note = f"{self.format}: of {worst or 'the one without a name'}, which holds most of {len(found)}"
        return replace(found[worst], notes=(note, *found[worst].notes), ranks=ranks)


class Shared:
    """A reader of lines that say themselves which rank they are of, or whose rank does not
    matter."""

    is_open = False

    def __init__(self, reader: LineReader) -> None:
        self._reader = reader
        self.format, self.marks = reader.format, reader.marks

    def line(self, line: LogLine) -> int:
        """Read one line; how many it explains."""
        return self._reader.line(line.text)

    def finding(self) -> Finding | None:
        """What all of them say."""
        return self._reader.finding()


def _held(finding: Finding) -> tuple[int, ...]:
    """What to compare: bytes by the order of `_WORST`, then milliseconds."""
    sizes = [_size(finding.readings.get(name)) for name in _WORST]
    phases = [_size(reading) for name, reading in finding.readings.items() if name.startswith("phases.")]
    times = sum(step.time_s or 0.0 for step in finding.steps) + sum(finding.rates.micro_step_s)
    return (*sizes, max(phases, default=-1), round(times * 1e3))


def _size(reading: Reading | None) -> int:
    return -1 if reading is None else reading.bytes
