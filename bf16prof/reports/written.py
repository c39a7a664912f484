"""How texts are written into CSV and Markdown files: nothing in them is markup, and nothing a
spreadsheet's formula."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence

from bf16prof.reports.units import NAME_LIMIT, inert

_FORMULA = re.compile(r"^\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_MARKDOWN = re.compile(r"([\\`*\[\]|~])")


def csv_text(value: object) -> object:
    """A text for a cell of a CSV file: control characters escaped, and a quote before what a
    spreadsheet would calculate."""
    if not isinstance(value, str):
        return value
    return ("'" if _FORMULA.match(value) or value.startswith(("\t", "\r", "\n")) else "") + inert(value, limit=None)


def markdown_text(value: str, limit: int | None = NAME_LIMIT) -> str:
    """A text for a cell of a Markdown table: nothing in it is markup, and it stays on its line."""
    return html.escape(_MARKDOWN.sub(r"\\\1", inert(value, limit)), quote=False)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """A table of texts that are fit for it; the columns that `left` does not name are aligned
    right."""
    from tabulate import tabulate

    sides = ["left" if header in left else "right" for header in headers]
    return str(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=sides if rows else None)) + "\n"


def markdown_list(lines: Iterable[str]) -> str:
    """A list of such texts."""
    return "".join(f"* {line}\n" for line in lines)
