"""What was asked: the line over every table, and all settings with their origins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from bf16prof.records import MemoryRecord
from bf16prof.reports.asked import asked_lines
from bf16prof.reports.console.layout import Column, heading, safe, table

LONGEST_VALUE = 200


def asked(records: Sequence[MemoryRecord], console: Console) -> None:
    """Print what the records are about, one line for each model."""
    for line in asked_lines(records):
        console.print(Text(line, "cyan"))


def settings_table(settings: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print every setting, its value and where it comes from."""
    heading(console, "Every setting, and where it comes from")
    columns = (Column("setting", "left", key=True), Column("value", "left", key=True), Column("from", "left", key=True))
    rows = [
        [safe(key), safe(one["value"], limit=LONGEST_VALUE), safe(one["origin"], "dim", LONGEST_VALUE)] for key, one in settings.items()
    ]
    table(console, columns, rows)
