"""How numbers and names are put in front of a person: bytes as GiB, signed differences, seconds,
and hostile names made harmless.

Bytes stay integers everywhere else; only here do they become text, and the text always says its
unit (GiB is 2**30).
"""

from __future__ import annotations

import math

UNKNOWN = "?"
"""What stands where a source does not know a value. Never a zero, never a guess."""

NOT_FINITE = "not finite"
"""What stands where a loss was NaN or infinite."""

EXACT = "exact"
"""What stands where a prediction and a measurement are the same integer."""

AS_PRINTED = "as printed"
"""What stands where a prediction may be the number that a log printed rounded."""

CONSISTENT = "consistent"
"""What stands where a prediction is not below a lower bound that a log proves."""

AT_LEAST = ">= "
"""What stands before a lower bound."""

NAME_LIMIT = 80
"""Characters of a name that are shown; what is longer is cut, and the cut is marked."""

MESSAGE_LIMIT = 600
"""Characters of a message or of one line of a log that are shown."""

_SCALES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def scale(largest: int | float | None) -> tuple[int, str]:
    """The divisor and the unit in which bytes up to `largest` read well: (2**30, "GiB") down to (1,
    "B")."""
    size = abs(largest or 0)
    return next(((divisor, unit) for divisor, unit in _SCALES if size >= divisor), (1, "B"))


def gib(value: int | float | None) -> str:
    """Bytes for a person: "25.74 GiB"; below one GiB in MiB, KiB or B, with the unit said. `None`
    is `UNKNOWN`."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    divisor, unit = scale(value)
    return f"{value:,.0f} B" if divisor == 1 else f"{value / divisor:,.2f} {unit}"


def part_of(value: int, total: int | None) -> str:
    """A part of a whole: "24.10 of 79.11 GiB", with two units only where they differ."""
    part, unit = gib(value).split(" ")
    if total is None:
        return gib(value)
    return f"{part} of {gib(total)}" if unit == scale(total)[1] else f"{part} {unit} of {gib(total)}"


def share(value: int | None, total: int | None) -> str:
    """A part of a whole as "12.3 %"; empty where one of them is not known."""
    return f"{value / total * 100:.1f} %" if value is not None and total else ""


def whole(value: int | None) -> str:
    """An exact integer with thousands separated: "27,637,000,192"."""
    return UNKNOWN if value is None else f"{value:,}"


def signed_bytes(difference: int | float | None) -> str:
    """A difference in bytes: "0 B" only when it is exactly zero, else with its sign: "+1.20
    KiB"."""
    if difference is None or not math.isfinite(difference):
        return UNKNOWN
    sign = "+" if difference > 0 else ""
    return sign + gib(difference)


def signed_percent(error: float | None) -> str:
    """A relative error: 0.0123 is "+1.23 %". Only zero reads "0 %"; an error below 0.01 % keeps one
    significant digit."""
    if error is None or not math.isfinite(error):
        return UNKNOWN
    if error == 0:
        return "0 %"
    percent = error * 100
    if abs(percent) < 1e-7:
        return f"{percent:+.1g} %"
    if abs(percent) < 0.01:
        return f"{percent:+.{math.ceil(-math.log10(abs(percent)))}f}".rstrip("0") + " %"
    return f"{percent:+.2f} %" if abs(percent) < 1e6 else f"{percent:+.2e} %"


def seconds(value: float | None) -> str:
    """Seconds for a person: "812 µs", "12.3 ms", "1.234 s"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if abs(value) >= 1 or value == 0:
        return f"{value:,.3f} s" if abs(value) < 100 else f"{value:,.1f} s"
    return f"{value * 1e3:.1f} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} µs"


def number(value: float | None) -> str:
    """A loss or a rate: four significant digits, thousands separated where it is large."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e9 else f"{value:.4g}"


def scaled(value: float | None) -> str:
    """A count with a decimal prefix, ready for its unit: "6.95 T"."""
    if value is None or not math.isfinite(value):
        return f"{UNKNOWN} "
    power = min(6, int(math.log10(abs(value)) // 3)) if abs(value) >= 1000 else 0
    return f"{value / 1000**power:.4g} {' kMGTPE'[power].strip()}"


def inert(text: object, limit: int | None = NAME_LIMIT) -> str:
    """Text from a file or a user, made harmless on one line.

    Whatever is not printable (control characters, ESC, newlines, bidirectional and zero-width
    marks, lone surrogates) becomes a visible escape such as `\\x1b`; what is longer than `limit`
    characters is cut and ends in an ellipsis. Markup is not touched: rich gets it as `Text`, Jinja
    escapes it.
    """
    whole_text = str(text)
    kept = whole_text if limit is None else whole_text[: limit + 1]
    safe = kept if kept.isprintable() else "".join(c if c.isprintable() else _visible(c) for c in kept)
    return safe if limit is None or len(safe) <= limit else safe[: limit - 1] + "…"


def inert_lines(text: str, limit: int = MESSAGE_LIMIT) -> list[str]:
    """A log tail as harmless lines. Tabs become spaces, a carriage return ends a line, as it would
    on a terminal."""
    return [inert(line.expandtabs(4), limit) for line in text.splitlines()]


def _visible(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
