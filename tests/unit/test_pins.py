"""Everything that `make` installs for development has one version in constraints.txt."""

from __future__ import annotations

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
