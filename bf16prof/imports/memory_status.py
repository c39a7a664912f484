"""DeepSpeed's `memory_status` (deepspeed/runtime/utils.py), which scripts and its pipeline engine
call on every rank, or on one:

    RANK=0 MEMSTATS after step device=cuda:0 current alloc=18.2031GB (delta=... max=24.9063GB) ...

Its GB are 2**30 bytes with four decimals; `max` is torch's peak counter, which the call resets only
if it is told to.
"""

from __future__ import annotations

import re

from bf16prof.imports.finding import GIB, NUMBER, Finding, Reading, highest, known, rounded
from bf16prof.imports.instants import instant_of
from bf16prof.vocabulary import Phase

_GB = rf"(-?{NUMBER})GB"
_LINE = re.compile(
    rf"\bRANK=(\d{{1,7}}) MEMSTATS (.{{0,300}}?) ?device=\S{{1,40}} current alloc={_GB} \(delta={_GB} max={_GB}\) "
    rf"current cache={_GB} \(delta={_GB} max={_GB}\)"
)


class MemoryStatusReader:
    """Reads the lines of all ranks, which name themselves; the one with the highest peak is
    told."""

    format = "DeepSpeed's memory_status"
    marks = ("memstats",)

    def __init__(self) -> None:
        self._ranks: dict[int, _Rank] = {}

    def line(self, text: str) -> int:
        """Read one line."""
        found = _LINE.search(text)
        if found is None or any(found[group].startswith("-") for group in (3, 5, 6, 8)):
            return 0
        self._ranks.setdefault(int(found[1]), _Rank()).add(found[2], *(rounded(found[group], GIB, 4) for group in (3, 5, 6, 8)))
        return 1

    def finding(self) -> Finding | None:
        """What the rank with the highest peak says."""
        if not self._ranks:
            return None
        worst = max(self._ranks, key=lambda rank: self._ranks[rank].peak.bytes)
        of = f", which holds most of {len(self._ranks)}" if len(self._ranks) > 1 else ""
        notes = [f"of rank {worst}{of}"]
        status = self._ranks[worst]
        if not status.saw_step:
            notes.append("no line after a step: its peaks are lower bounds")
        return Finding(self.format, status.readings(), notes=tuple(f"{self.format}: {n}" for n in notes), ranks=max(self._ranks) + 1)


class _Rank:
    """The highest that one rank has said, and what is allocated after its last step."""

    def __init__(self) -> None:
        self.peak = self.reserved = Reading(0)
        self.allocated: Reading | None = None
        self.saw_step = False

    def add(self, message: str, allocated: Reading, peak: Reading, cached: Reading, most_cached: Reading) -> None:
        """Take in one line."""
        self.peak = highest([self.peak, allocated, peak]) or peak
        self.reserved = highest([self.reserved, cached, most_cached]) or most_cached
        place, phase = instant_of(message)
        if place == "after" and phase is Phase.STEP:
            self.saw_step, self.allocated = True, allocated

    def readings(self) -> dict[str, Reading]:
        """The peak is that of the whole run once a step is over; before that, a lower bound."""
        peak, reserved = (r if self.saw_step else r.as_floor() for r in (self.peak, self.reserved))
        return known(allocated_bytes=self.allocated, run_peak_allocated_bytes=peak, reserved_bytes=reserved)
