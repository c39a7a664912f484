"""Where the kernel says what this process's container may have of the memory, and what has become
of it: control groups, versions 1 and 2 (the kernel's Documentation/admin-guide/cgroup-v1 and
cgroup-v2.rst)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from bf16prof.errors import InputError
from bf16prof.files import LARGEST_SETTINGS, read_up_to

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

LIMITS = ("memory.max", "memory.limit_in_bytes")
"""The file of a limit in bytes, of version 2 and of version 1."""

UNLIMITED = 2**60
"""Version 1 has no word for "no limit": it shows the largest number of whole pages."""


def memory_limit() -> int | None:
    """The bytes that this container may use, by its own group or one above it; `None` where there
    is no limit, or nobody can tell."""
    found = [int(text) for path in memory_files(*LIMITS) if (text := text_of(path).strip()).isdecimal()]
    return min((limit for limit in found if limit < UNLIMITED), default=None)


def memory_files(version_2: str, version_1: str) -> Iterator[Path]:
    """Where that file of the memory controller may be: in this process's group and in those above
    it, the narrowest first.

    In a container the path may be one that only its host has; then the root is the container's own
    group.
    """
    for line in text_of(MEMBERSHIP).splitlines() or ["0::/", "0:memory:/"]:
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            root, name = ROOT, version_2
        elif "memory" in controllers.split(","):
            root, name = ROOT / "memory", version_1
        else:
            continue
        own = PurePosixPath(group.strip("/"))
        yield from (root / each / name for each in (own, *own.parents) if ".." not in each.parts)


def text_of(path: Path) -> str:
    """The text of a file of the system's; empty if there is none."""
    try:
        return read_up_to(LARGEST_SETTINGS, path).decode(errors="replace")
    except InputError:
        return ""
