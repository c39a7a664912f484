"""Compiling before the ranks start: once per version, under no dead process's lock, and with one
clear line when it does not work."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from harness import alive, descendants, end, finish, measure, measure_arguments, start, wait_for

from bf16prof.locks import held

pytestmark = pytest.mark.timeout(600)
shared_cache = pytest.mark.xdist_group("cache")

CASE = ("--zero", "1", "--recipe", "bf16-full")
VERSIONS = re.escape(
    f"torch{metadata.version('torch')}-deepspeed{metadata.version('deepspeed')}-py{sys.version_info[0]}{sys.version_info[1]}"
)


def cache(home: Path) -> Path:
    """Where bf16prof keeps compiled extensions under that XDG_CACHE_HOME: one folder, as there is
    one environment."""
    (folder,) = (home / "bf16prof").iterdir()
    assert re.fullmatch(VERSIONS + "-[0-9a-f]{12}", folder.name)
    return folder


def leave_lock(home: Path, extension: str) -> Path:
    """The lock file of a build or a load that was killed (torch/utils/file_baton.py)."""
    lock = cache(home) / extension / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    return lock


def path_without_ninja(folder: Path) -> str:
    """The PATH as it is, but for the ninja: as on a bare machine where nobody activated the virtual
    environment."""
    for entry in map(Path, os.environ["PATH"].split(os.pathsep)):
        for command in entry.glob("*"):
            if command.name != "ninja" and not (folder / command.name).is_symlink():
                (folder / command.name).symlink_to(command)
    assert shutil.which("ninja", path=folder) is None
    return str(folder)


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An XDG_CACHE_HOME whose cache one measurement has filled, in spite of a bare PATH."""
    folder = tmp_path_factory.mktemp("cache")
    found = {"XDG_CACHE_HOME": str(folder), "PATH": path_without_ninja(tmp_path_factory.mktemp("bin"))}
    done = measure(tmp_path_factory.mktemp("runs") / "run", *CASE, env=found)
    assert done.code == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("compiling allocator, ShareMemCommBuilder, once")]
    return found


@pytest.fixture(scope="module")
def home(variables: dict[str, str]) -> Path:
    """The XDG_CACHE_HOME."""
    return Path(variables["XDG_CACHE_HOME"])


def compiled(home: Path) -> dict[str, int]:
    """Every shared library in the cache, with the time when it was made."""
    return {str(path.relative_to(cache(home))): path.stat().st_mtime_ns for path in cache(home).rglob("*.so")}


@shared_cache
def test_extensions_are_cached_by_version(home: Path) -> None:
    assert set(compiled(home)) == {"bf16prof_allocator/bf16prof_allocator.so", "deepspeed_shm_comm/deepspeed_shm_comm.so"}
    assert not list(cache(home).rglob("*lock"))


@shared_cache
def test_what_killed_processes_leave_does_not_hang_the_next_run(home: Path, variables: dict[str, str], tmp_path: Path) -> None:
    """Ranks take torch's locks even to load what is compiled already. Somebody else uses the cache
    all the time."""
    before = compiled(home)
    for extension in ("bf16prof_allocator", "deepspeed_shm_comm"):
        leave_lock(home, extension)
    (cache(home) / "build.lock").touch()
    with (cache(home) / "users.lock").open("w") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        done = measure(tmp_path / "run", *CASE, "--timeout", "60", env=variables)

    assert done.code == 0, done.stderr
    assert "compiling" not in done.stderr
    assert compiled(home) == before, "nothing is compiled twice"


@shared_cache
@pytest.mark.nightly
def test_another_environment_shares_nothing(home: Path, variables: dict[str, str], tmp_path: Path) -> None:
    """It has another compiler; its extensions are compiled before the clock of a case runs, and
    said."""
    before = compiled(home)
    wrapper = tmp_path / "my c++"
    wrapper.write_text('#!/bin/sh\nexec c++ "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    link = tmp_path / "c++"
    link.symlink_to(wrapper)
    other = tmp_path / "cache"
    shutil.copytree(variables["XDG_CACHE_HOME"], other)
    done = measure(tmp_path / "run", *CASE, env={**variables, "XDG_CACHE_HOME": str(other), "CXX": str(link)})

    assert done.code == 0, done.stderr
    assert "compiling allocator, ShareMemCommBuilder" in done.stderr
    assert len(list((other / "bf16prof").iterdir())) == 2
    assert compiled(home) == before


@shared_cache
def test_a_build_by_somebody_else_is_waited_for_visibly(home: Path, variables: dict[str, str], tmp_path: Path) -> None:
    folder = cache(home)
    (folder / "allocator.compiled").rename(folder / "kept")
    with held(folder / "build.lock"):
        process = start(*measure_arguments(tmp_path / "run", *CASE, "--json"), env=variables)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("waiting for process"):
                break
        (folder / "kept").rename(folder / "allocator.compiled")
    done = finish(process)

    assert line.startswith(f"waiting for process {os.getpid()} on ")
    assert done.code == 0, done.stderr
    assert "compiling" not in done.stderr


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
    assert message.startswith(f"bf16prof: cannot write the extension cache {tmp_path / 'cache' / 'bf16prof'}")
    assert "TORCH_EXTENSIONS_DIR" in hint


@pytest.mark.parametrize("victim", ["bf16prof by SIGINT", "bf16prof by SIGKILL", "the compiling process by SIGKILL", "ninja by SIGKILL"])
def test_stopped_while_compiling_it_leaves_no_compiler_behind(tmp_path: Path, victim: str) -> None:
    """The compiler is one that does not end once ninja runs it, which gives it a process group of
    its own."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *" -c "*) touch "${TMPDIR:-/tmp}/cc1.s"; sleep 600;; esac\nexec c++ "$@"\n', encoding="utf-8"
    )
    compiler.chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(compiler), "TMPDIR": str(temporary)}
    process = start(*measure_arguments(tmp_path / "run", *CASE), env=environment)
    family: list[psutil.Process] = []

    def compiles() -> bool:
        assert process.poll() is None, finish(process)
        family[:] = descendants(process)
        return any(child.name() == "sleep" for child in alive(family))

    try:
        wait_for("the compiler runs", compiles)
        if victim.startswith("bf16prof"):
            process.send_signal(signal.Signals[victim.rpartition(" ")[2]])
        else:
            words = "ninja" if victim.startswith("ninja") else "bf16prof.measuring.prepare"
            next(child for child in family if any(word.endswith(words) for word in child.cmdline())).kill()
        process.wait(10)
        wait_for("all compilers are gone", lambda: not alive(family), 5)
        assert not [path for path in temporary.iterdir() if path.suffix in {".s", ".o", ".ii"}]
        assert victim == "bf16prof by SIGKILL" or not list(tmp_path.glob("cache/**/tmp"))
    finally:
        end(process)
        for child in alive(family):
            child.kill()
