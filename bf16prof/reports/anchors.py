"""The anchors of cases on the page: each is called as its case is, so that a link to it says what
it shows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bf16prof.reports.views import CaseView

RESERVED = frozenset({"answers", "memory", "map", "summary", "failures", "inside", "phases", "times", "losses", "price", "cases", "runs"})
"""Anchors of the page's sections."""


def anchors(views: Sequence[CaseView]) -> list[str]:
    """One anchor per case: its label, with a dash for what an address does not carry as it is, and
    a number where two are the same."""
    found: list[str] = []
    for view in views:
        plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", view.label).strip("-") or "case"
        number, name = 1, plain
        while name in found or name in RESERVED:
            number += 1
            name = f"{plain}-{number}"
        found.append(name)
    return found
