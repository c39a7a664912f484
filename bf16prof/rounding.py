"""Rounding up, in whole numbers."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """The smallest whole number not below a / b."""
    return -(-a // b)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below a size."""
    return -(-size // multiple) * multiple


def short_count(count: int, space: str = "") -> str:
    """A count in three digits: 7615616512 is "7.62B"; `space` stands before the unit."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{space}{unit}"
    return str(count)
