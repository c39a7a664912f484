"""Whether the kernel has killed processes because there was no memory left: its own counts say so, the dead cannot.

A process that is killed so ends with SIGKILL, like one that somebody killed.
"""

from __future__ import annotations

from pathlib import Path

from bf16prof.files import LARGEST_SETTINGS, read_up_to

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
WHOLE_SYSTEM = Path("/proc/vmstat")
COUNTER = "oom_kill"


class MemoryKills:
    """The count when this was made; of this container where it has one, else of the system."""

    def __init__(self) -> None:
        self._files = [path for path in _files() if _count(path) is not None][:1]
        self._before = self._now()

    def happened(self) -> bool:
        """Whether it has risen since."""
        return self._now() > self._before

    def _now(self) -> int:
        return sum(_count(path) or 0 for path in self._files)


def _files() -> list[Path]:
    """Where the count may be, the narrowest first: control groups of version 2 and 1 (Documentation/admin-guide), then the system."""
    found = []
    for line in _text(MEMBERSHIP).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            found += [CGROUPS / path.strip("/") / "memory.events", CGROUPS / "memory.events"]
        elif controllers == "memory":
            found += [CGROUPS / "memory" / path.strip("/") / "memory.oom_control", CGROUPS / "memory" / "memory.oom_control"]
    return [*found, WHOLE_SYSTEM]


def _count(path: Path) -> int | None:
    for line in _text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == COUNTER and value.strip().isdecimal():
            return int(value)
    return None


def _text(path: Path) -> str:
    return read_up_to(LARGEST_SETTINGS, path).decode(errors="replace") if path.is_file() else ""
