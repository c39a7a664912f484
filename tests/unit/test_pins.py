"""Everything that `make` installs for development has one version in constraints.txt."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pinned() -> dict[str, str]:
    """By name, the version of every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([specifier.operator for specifier in each.specifier] == ["=="] for each in found)
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in found}


def closure(name: str, extras: frozenset[str]) -> set[str]:
    """What is installed because that is, directly or not."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, extras)]
    while waiting:
        this = waiting.pop()
        if this in seen:
            continue
        seen.add(this)
        try:
            requirements = map(Requirement, metadata.requires(this[0]) or [])
        except metadata.PackageNotFoundError:  # for another platform
            continue
        for each in requirements:
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in (*this[1], "")):
                waiting.append((canonicalize_name(each.name), frozenset(each.extras)))
    return {found for found, _ in seen} - {name}


def test_no_package_is_without_a_pin() -> None:
    needed = closure("bf16prof", frozenset({"dev"}))

    assert {"torch", "transformers", "mypy", "ruff", "selenium", "hypothesis"} < needed, "the list is followed"
    installed = {name for name in needed if any(True for _ in metadata.distributions(name=name))}
    assert installed - {"pip"} - set(pinned()) == set()


def test_tests_of_a_group_run_in_one_process(tmp_path: Path) -> None:
    """Or every process would measure what only one has to: a release of pytest has broken it
    before, and no test failed."""
    (tmp_path / "test_group.py").write_text(
        "import os, pathlib, pytest\n"
        "@pytest.mark.xdist_group('together')\n"
        "@pytest.mark.parametrize('number', range(8))\n"
        "def test_one(number):\n"
        "    pathlib.Path(f'{os.getpid()}.ran').touch()\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "2", "--dist", "loadgroup"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("*.ran"))) == 1
