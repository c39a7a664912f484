"""Tables that ship with the package as TOML files, and the presets: one file each, of which only
the one that is used is parsed."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from typing import Any


def shipped_text(file: str, package: str = "bf16prof.profiles") -> str:
    """The text of a file of the package."""
    return (resources.files(package) / file).read_text(encoding="utf-8")


def shipped_table(file: str, package: str = "bf16prof.profiles") -> dict[str, Any]:
    """The content of a TOML file of the package."""
    return tomllib.loads(shipped_text(file, package))


def shipped_names(folder: str, package: str = "bf16prof.profiles", suffix: str = ".toml") -> list[str]:
    """The names of the tables that ship in a folder of the package."""
    entries = (entry.name for entry in (resources.files(package) / folder).iterdir())
    return sorted(name.removesuffix(suffix) for name in entries if name.endswith(suffix))


PRESETS = "presets"
PRESET_SUFFIXES = (".toml", ".json")
"""A preset is a profile in TOML; in JSON where the model's configuration says null, which TOML
cannot."""


def preset_files() -> dict[str, str]:
    """The file of every preset, by its name."""
    found = {name: f"{PRESETS}/{name}{suffix}" for suffix in PRESET_SUFFIXES for name in shipped_names(PRESETS, suffix=suffix)}
    return dict(sorted(found.items(), key=lambda item: _in_order(item[0])))


def _in_order(name: str) -> list[tuple[str, float]]:
    """A key that sorts numbers in names by their size: 7b before 14b."""
    return [(text, float(number or 0)) for text, number in re.findall(r"([^\d]+)(\d+(?:\.\d+)?)?", name)]


def preset_ids() -> dict[str, tuple[str, ...]]:
    """By what every preset is called: its own name, and those that its file lists (`names`, on one
    line), as they are on the Hub."""
    return {name: (name, *_listed(shipped_text(file))) for name, file in preset_files().items()}


def _listed(text: str) -> list[str]:
    line = re.search(r'^\s*"?names"?\s*[:=](.*)$', text, re.MULTILINE)
    return re.findall(r'"([^"]+)"', line[1]) if line else []
