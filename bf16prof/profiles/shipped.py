"""Tables that ship with the package as TOML files."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any


def shipped_text(file: str, package: str = "bf16prof.profiles") -> str:
    """The text of a file of the package."""
    return (resources.files(package) / file).read_text(encoding="utf-8")


def shipped_table(file: str, package: str = "bf16prof.profiles") -> dict[str, Any]:
    """The content of a TOML file of the package."""
    return tomllib.loads(shipped_text(file, package))


def shipped_names(folder: str, package: str = "bf16prof.profiles") -> list[str]:
    """The names of the tables that ship in a folder of the package."""
    entries = (entry.name for entry in (resources.files(package) / folder).iterdir())
    return sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml"))

