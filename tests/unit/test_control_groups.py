"""What the kernel says of a container: its limit of memory, and how many of its processes were
killed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bf16prof import control_groups, memory_kills
from bf16prof.control_groups import memory_limit
from bf16prof.measuring.checks import _memory
from bf16prof.measuring.machine import usable_memory
from bf16prof.memory_kills import MemoryKills

NO_LIMIT_IN_VERSION_1 = "9223372036854771712"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose control groups are files in a folder."""
    monkeypatch.setattr(control_groups, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(control_groups, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory_kills, "WHOLE_SYSTEM", tmp_path / "vmstat")
    return tmp_path


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"membership": "0::/", "fs/memory.max": "8589934592"}, 2**33),
        ({"membership": "0::/", "fs/memory.max": "max"}, None),
        ({"membership": "0::/job/step", "fs/job/step/memory.max": "max", "fs/job/memory.max": "4096"}, 4096),
        ({"membership": "0::/job/step", "fs/job/step/memory.max": "2048", "fs/job/memory.max": "4096"}, 2048),
        ({"membership": "0::/only/on/the/host", "fs/memory.max": "4096"}, 4096),
        ({"membership": "0::/../../escaped", "fs/memory.max": "4096", "escaped/memory.max": "1"}, 4096),
        ({"membership": "3:cpu,cpuacct:/x\n2:memory:/docker/abc", "fs/memory/docker/abc/memory.limit_in_bytes": "1024"}, 1024),
        ({"membership": "2:memory:/docker/abc\n0::/", "fs/memory/memory.limit_in_bytes": "1024"}, 1024),
        ({"membership": "2:memory:/", "fs/memory/memory.limit_in_bytes": NO_LIMIT_IN_VERSION_1}, None),
        ({"fs/memory.max": "4096"}, 4096),
        ({"membership": "garbled\n\n::", "fs/memory.max": "what"}, None),
        ({}, None),
    ],
)
def test_the_narrowest_limit_holds(files: dict[str, str], limit: int | None, system: Path) -> None:
    put(system, files)

    assert memory_limit() == limit
    assert usable_memory() == limit or limit is None


def test_doctor_shows_the_limit(system: Path) -> None:
    put(system, {"membership": "0::/", "fs/memory.max": str(3 * 2**29)})

    assert _memory().detail.endswith("of which this container may use 1.5 GiB")


@pytest.mark.parametrize(
    ("membership", "file"),
    [("4:memory:/other\n0::/mine", "fs/mine/memory.events"), ("4:memory:/mine", "fs/memory/mine/memory.oom_control")],
)
def test_the_kernels_count_of_this_container_is_read(membership: str, file: str, system: Path) -> None:
    put(system, {"membership": membership, file: "low 0\noom 3\noom_kill 3", "vmstat": "oom_kill 7"})
    kills = MemoryKills()
    assert not kills.happened()

    put(system, {"vmstat": "oom_kill 8"})
    assert not kills.happened(), "of another container"

    put(system, {file: "low 0\noom 4\noom_kill 4"})
    assert kills.happened()


def test_without_control_groups_the_system_counts(system: Path) -> None:
    put(system, {"vmstat": "oom_kill 7"})
    kills = MemoryKills()
    put(system, {"vmstat": "oom_kill 8"})

    assert kills.happened()


def test_where_nobody_counts_nothing_happened(system: Path) -> None:
    assert not MemoryKills().happened()
