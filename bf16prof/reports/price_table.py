"""The table that sets bytes beside learning: by case, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.profiles.recipes import all_recipes
from bf16prof.reports.cells import Cell, Table, interval_cell, number_cell, unknown_cell, without_empty
from bf16prof.reports.intervals import Interval
from bf16prof.reports.learning import learning
from bf16prof.reports.losses import SeedGroup, loss_gaps, seed_groups
from bf16prof.reports.price_figure import learned, states_per_parameter
from bf16prof.reports.views import CaseView

CAPTION = "Price in learning: bytes of model states per parameter between steps, lost updates and effective descent quality (EDQ)"
BYTES_HEADER, HELD_HEADER = "bytes per parameter", "on a rank"
"""As the caption says; and the part of them that a rank of this job holds between steps: ZeRO cuts,
and gradients may be gone."""


def price_table(views: Sequence[CaseView]) -> Table | None:
    """One row per case whose updates were watched: what its model states weigh, and what became of
    its updates and its loss."""
    groups = seed_groups(views)
    gaps = {gap.group.indices: gap.gap for gap in loss_gaps(groups)}
    rows = tuple(_row(group, gaps.get(group.indices)) for group in groups if any(learning(view.main) for view in group.views))
    headers = ("case", BYTES_HEADER, HELD_HEADER, "lost updates", "EDQ", "loss gap")
    return without_empty(Table(CAPTION, headers, rows)) if rows else None


def _row(group: SeedGroup, gap: Interval | None) -> tuple[Cell, ...]:
    lost = learned(group, "lost_updates")
    percent = lost and Interval(100 * lost.mean, None if lost.half_width is None else 100 * lost.half_width, lost.count)
    return (
        Cell(group.label, style="label"),
        _bytes(group.recipe),
        number_cell(states_per_parameter(group.views[0].main)),
        Cell(f"{percent.text(2)} %", percent.mean, "number") if percent else Cell("no finite update", style="number bad"),
        interval_cell(learned(group, "edq")),
        interval_cell(gap, signed=True),
    )


def _bytes(recipe: str) -> Cell:
    """The bytes of a recipe by its name; not known of what a user's JSON describes."""
    known = all_recipes().get(recipe)
    return Cell(known.bytes_in_words, known.steady_bytes_per_parameter, "number") if known else unknown_cell()
