"""Numbers and names as text."""

from __future__ import annotations

import math

import pytest
from report_fixtures import HOSTILE

from bf16prof.reports import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (-1, "-1 B"),
        (1536, "1.50 KiB"),
        (3 * 2**20, "3.00 MiB"),
        (27_637_000_192, "25.74 GiB"),
        (-27_637_000_192, "-25.74 GiB"),
        (2**62, "4,294,967,296.00 GiB"),
        (None, "?"),
        (math.nan, "?"),
    ],
)
def test_bytes_say_their_unit(value: int | None, text: str) -> None:
    assert units.gib(value) == text


def test_only_equality_is_zero() -> None:
    assert units.signed_bytes(0) == "0 B"
    assert units.signed_bytes(1) == "+1 B"
    assert units.signed_bytes(-1229) == "-1.20 KiB"
    assert units.signed_percent(0.0) == "0 %"
    assert units.signed_percent(1 / 8_000_000_000) not in {"0 %", "+0.00 %"}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.0123, "+1.23 %"),
        (-0.2, "-20.00 %"),
        (1.52e-7, "+0.00002 %"),
        (9.6e-8, "+0.00001 %"),
        (-3e-12, "-3e-10 %"),
        (1e9, "+1.00e+11 %"),
        (None, "?"),
        (math.inf, "?"),
    ],
)
def test_percent(error: float | None, text: str) -> None:
    assert units.signed_percent(error) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000 s"),
        (1e-9, "0.001 µs"),
        (0.0123, "12.3 ms"),
        (1.2345, "1.234 s"),
        (1234.5, "1,234.5 s"),
        (None, "?"),
        (math.nan, "?"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_inert_text_is_one_short_printable_line(text: str) -> None:
    shown = units.inert(text)
    assert shown.isprintable()
    assert len(shown) <= units.NAME_LIMIT


def test_inert_shows_what_it_removed() -> None:
    assert units.inert("a\x1b[31m\n\u202eb") == "a\\x1b[31m\\n\\u202eb"
    assert units.inert("x" * 300) == "x" * 79 + "…"
    assert units.inert("x" * 300, limit=None) == "x" * 300
    assert units.inert("\ud800") == "\\ud800"


def test_ordinary_names_are_untouched() -> None:
    for name in ("bf16-fp32-master", "Qwen/Qwen3-8B", "наш прогон", "模型", "a" * 80):
        assert units.inert(name) == name


def test_a_log_keeps_its_lines() -> None:
    assert units.inert_lines("one\n\ttwo\x1b[0m\r\nthree") == ["one", "    two\\x1b[0m", "three"]
