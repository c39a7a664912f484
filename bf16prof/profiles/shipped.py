"""Tables that ship with the package as TOML files, and how one of their rows is found by its name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any, TypeVar

from bf16prof.errors import InputError

Row = TypeVar("Row")


def shipped_table(file: str, package: str = "bf16prof.profiles") -> dict[str, Any]:
    """The content of a TOML file of the package."""
    return tomllib.loads((resources.files(package) / file).read_text(encoding="utf-8"))


def named(what: str, id_: str, known: Mapping[str, Row]) -> Row:
    """The row of that name. Raises `InputError` saying what is unknown, and what is known."""
    if id_ not in known:
        raise InputError(f"unknown {what} {id_!r}", hint="known: " + ", ".join(known))
    return known[id_]
