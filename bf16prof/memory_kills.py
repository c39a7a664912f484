"""Whether the kernel has killed processes because there was no memory left: its own counts say so,
the dead cannot.

A process that is killed so ends with SIGKILL, like one that somebody killed.
"""

from __future__ import annotations

from pathlib import Path

from bf16prof.control_groups import memory_files, text_of

WHOLE_SYSTEM = Path("/proc/vmstat")
COUNTS = ("memory.events", "memory.oom_control")
COUNTER = "oom_kill"


class MemoryKills:
    """The count when this was made; of this container where it has one, else of the system."""

    def __init__(self) -> None:
        places = (*memory_files(*COUNTS), WHOLE_SYSTEM)
        self._file = next((path for path in places if _count(path) is not None), None)
        self._before = self._now()

    def happened(self) -> bool:
        """Whether it has risen since."""
        return self._now() > self._before

    def _now(self) -> int:
        return 0 if self._file is None else _count(self._file) or 0


def _count(path: Path) -> int | None:
    for line in text_of(path).splitlines():
        name, _, value = line.partition(" ")
        if name == COUNTER and value.strip().isdecimal():
            return int(value)
    return None
