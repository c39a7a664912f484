"""Published numbers, each with its citation, from `tests/data/published_formulas.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "published_formulas.json").read_text(encoding="utf-8"))


def rows(source: str, metric: str) -> list[dict[str, Any]]:
    """The rows of a source about a metric; never none."""
    found = [row for row in ROWS if row["source"] == source and row["metric"] == metric]
    assert found
    return found
