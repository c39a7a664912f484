"""docs/models.md: which model types have a closed form, how near it is, and why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models import ModelRow

NEAR = 0.001
LONGEST = 160
"""Characters of a reason."""


def page(seed: int, code: str, rows: Sequence[ModelRow], total: int) -> str:
    """The whole page, the worst first."""
    compared = sorted((row for row in rows if not row.reason), key=lambda row: (-abs(row.worst), row.name))
    others = sorted((row for row in rows if row.reason), key=lambda row: row.name)
    lines = [
        "# Model types: which have a closed form, and how near it is",
        "",
        f"Written by `make models` (seed {seed}; {code}).",
        "Of each model type of transformers a small model and a job are drawn (stage, ranks, recipe, checkpointing, accumulation, ...).",
        "Its own code is recorded, and the peak of every phase is held against the dry run of the real engine.",
        "",
        f"{len(rows)} of {total} model types have been looked at, in a drawn order: {len(compared)} compared, {len(others)} not.",
        f"Of those compared the steady state is equal to the byte in {sum(row.steady_error_bytes == 0 for row in compared)},",
        f"every phase is within 0.1 % in {sum(abs(row.worst) < NEAR for row in compared)}, and the phase that sets the peak is right",
        f"(or two are within 2 %) in {sum(row.is_phase_right for row in compared)}.",
        "",
        "## Compared, the worst first",
        "",
        "| model type | steady state | worst error of a phase's peak | job |",
        "|---|---:|---:|---|",
        *(f"| {row.name} | {row.steady_error_bytes:+,} B | {row.worst:+.4%} | {_cell(row.job)} |" for row in compared),
        "",
        "## Not compared, and why",
        "",
        "| model type | why |",
        "|---|---|",
        *(f"| {row.name} | {_cell(row.reason)} |" for row in others),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = text.replace("|", "/")
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."
