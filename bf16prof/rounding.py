"""Rounding up, in whole numbers."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """The smallest whole number not below a / b."""
    return -(-a // b)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below a size."""
    return -(-size // multiple) * multiple
