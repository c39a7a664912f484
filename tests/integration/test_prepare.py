"""Compiling before the ranks start: once per version, under no dead process's lock, and with one clear line when it does not work."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from harness import alive, descendants, end, finish, measure, measure_arguments, start, wait_for

pytestmark = pytest.mark.timeout(280)

CASE = ("--zero", "1", "--recipe", "bf16-full")
VERSIONS = f"torch{metadata.version('torch')}-deepspeed{metadata.version('deepspeed')}-py{sys.version_info[0]}{sys.version_info[1]}"


def cache(home: Path) -> Path:
    """Where bf16prof keeps compiled extensions under that XDG_CACHE_HOME."""
    return home / "bf16prof" / VERSIONS


def leave_lock(home: Path, extension: str) -> Path:
    """The lock file of a build or a load that was killed (torch/utils/file_baton.py)."""
    lock = cache(home) / extension / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    return lock


def path_without_ninja(folder: Path) -> str:
    """The PATH as it is, but for the ninja: as on a bare machine where nobody activated the virtual environment."""
    for entry in map(Path, os.environ["PATH"].split(os.pathsep)):
        for command in entry.glob("*"):
            if command.name != "ninja" and not (folder / command.name).is_symlink():
                (folder / command.name).symlink_to(command)
    assert shutil.which("ninja", path=folder) is None
    return str(folder)


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An XDG_CACHE_HOME whose cache one measurement has filled, in spite of a dead build's lock and of a bare PATH."""
    folder = tmp_path_factory.mktemp("cache")
    lock = leave_lock(folder, "bf16prof_allocator")
    found = {"XDG_CACHE_HOME": str(folder), "PATH": path_without_ninja(tmp_path_factory.mktemp("bin"))}
    done = measure(tmp_path_factory.mktemp("runs") / "run", *CASE, env=found)
    assert done.code == 0, done.stderr
    assert not lock.exists()
    return found


@pytest.fixture(scope="module")
def home(variables: dict[str, str]) -> Path:
    """The XDG_CACHE_HOME."""
    return Path(variables["XDG_CACHE_HOME"])


def compiled(home: Path) -> dict[str, int]:
    """Every shared library in the cache, with the time when it was made."""
    return {str(path.relative_to(cache(home))): path.stat().st_mtime_ns for path in cache(home).rglob("*.so")}


def test_extensions_are_cached_by_version(home: Path) -> None:
    assert set(compiled(home)) == {"bf16prof_allocator/bf16prof_allocator.so", "deepspeed_shm_comm/deepspeed_shm_comm.so"}
    assert [path.name for path in (home / "bf16prof").iterdir()] == [VERSIONS]
    assert not list(cache(home).rglob("lock"))


def test_the_lock_of_a_killed_rank_does_not_hang_the_next_run(home: Path, variables: dict[str, str], tmp_path: Path) -> None:
    """Ranks take torch's locks even to load what is compiled already."""
    before = compiled(home)
    locks = [leave_lock(home, extension) for extension in ("bf16prof_allocator", "deepspeed_shm_comm")]
    done = measure(tmp_path / "run", *CASE, "--timeout", "60", env=variables)

    assert done.code == 0, done.stderr
    assert not [lock for lock in locks if lock.exists()]
    assert compiled(home) == before, "nothing is compiled twice"


def test_a_broken_compiler_is_one_line_and_a_hint(tmp_path: Path) -> None:
    done = measure(tmp_path / "run", *CASE, env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": "/bin/false"})

    assert done.code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    *_, message, hint = done.stderr.splitlines()
    assert message.startswith("bf16prof: cannot compile allocator")
    assert hint.startswith("  hint: bf16prof doctor")
    log = Path(hint.rpartition(" ")[2])
    assert log.parent == cache(tmp_path / "cache")
    assert "/bin/false" in log.read_text(encoding="utf-8")


def test_a_cache_that_cannot_be_written_is_one_line_and_a_hint(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    done = measure(tmp_path / "run", *CASE, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})

    assert done.code == 2
    *_, message, hint = done.stderr.splitlines()
    assert message.startswith(f"bf16prof: cannot write the extension cache {cache(tmp_path / 'cache')}")
    assert "TORCH_EXTENSIONS_DIR" in hint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_compiling_it_leaves_no_compiler_behind(tmp_path: Path, number: signal.Signals) -> None:
    """The compiler is one that never ends."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || [ "$1" = -dumpfullversion ] || sleep 600\nexec c++ "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    process = start(*measure_arguments(tmp_path / "run", *CASE), env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(compiler)})
    family: list[psutil.Process] = []

    def compiles() -> bool:
        assert process.poll() is None, finish(process)
        family[:] = descendants(process)
        return any(child.name() == "sleep" for child in alive(family))

    try:
        wait_for("the compiler runs", compiles)
        process.send_signal(number)
        process.wait(10)
        wait_for("all compilers are gone", lambda: not alive(family), 5)
    finally:
        end(process)
        for child in alive(family):
            child.kill()
