"""The versions of DeepSpeed, PyTorch and transformers that are supported, those that were tried,
and those that do not work."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bf16prof.profiles.shipped import shipped_table


@dataclass(frozen=True)
class Support:
    """One package: the oldest supported release, the releases that the dry run was tried with, and
    those that do not work, with the reason (`versions.toml`)."""

    oldest: str
    tested: tuple[str, ...]
    broken: Mapping[str, str]

    @property
    def newest(self) -> str:
        """The last release that was tried."""
        return max(self.tested, key=version_tuple)

    def reason_against(self, version: str) -> str:
        """Why a release does not work; empty where nothing is known against it."""
        return next((reason for release, reason in self.broken.items() if _is_of(version, release)), "")

    def untested(self, version: str) -> str:
        """What to say of a release that was not tried: between which releases it lies; empty for
        one that was."""
        release = version_tuple(version)
        if release in map(version_tuple, self.tested):
            return ""
        if release > version_tuple(self.newest):
            return f"later than {self.newest}, the last"
        return "not among the releases"


@functools.cache
def supported() -> dict[str, Support]:
    """Every package by name."""
    table = shipped_table("versions.toml", "bf16prof.engine")
    return {name: Support(row["oldest"], tuple(row["tested"]), row["broken"]) for name, row in table.items()}


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _is_of(version: str, release: str) -> bool:
    """Whether a version is that release, or one of its patches where the release names none."""
    wanted = version_tuple(release)
    return version_tuple(version)[: len(wanted)] == wanted


OLDEST_DEEPSPEED, NEWEST_DEEPSPEED = supported()["deepspeed"].oldest, supported()["deepspeed"].newest

OLDEST = {name: supported()[name].oldest for name in ("torch", "deepspeed")}
"""The oldest versions that are supported."""
