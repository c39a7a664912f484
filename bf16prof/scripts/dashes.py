"""Where a command line is cut in two: own arguments before `--`, a training script and its
arguments behind it."""

from __future__ import annotations

from collections.abc import Sequence


def split(arguments: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """A command's own arguments, and what stands after the first `--`; `None` where there is no
    `--`."""
    if "--" not in arguments:
        return list(arguments), None
    at = arguments.index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])
