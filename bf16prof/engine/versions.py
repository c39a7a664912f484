"""The versions of DeepSpeed and PyTorch that are supported."""

from __future__ import annotations

import re

OLDEST_DEEPSPEED = "0.18.3"
"""The first with the bf16 master options."""

NEWEST_DEEPSPEED = "0.19.8"
"""The one that this version was developed against. A test runs both."""

OLDEST = {"torch": "2.6", "deepspeed": OLDEST_DEEPSPEED}
"""The oldest versions that are supported."""


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
