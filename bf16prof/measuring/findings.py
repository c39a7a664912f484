"""What `doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check came out: `ok`; `missing`, not on this machine; `warning`, there, but not as it
    should be."""

    OK = "ok"
    MISSING = "missing"
    WARNING = "warning"


@dataclass(frozen=True)
class Check:
    """One thing that was looked for: a line on what was found, and a line on what to do about it
    ("" if nothing)."""

    name: str
    status: State
    detail: str
    hint: str = ""
