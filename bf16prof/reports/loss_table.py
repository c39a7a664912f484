"""The table of the losses: by case, over its seeds; and what has to be said of these losses beside
it."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.profiles.recipes import all_recipes
from bf16prof.reports.cells import Cell, Table, interval_cell, unknown_cell, without_empty
from bf16prof.reports.intervals import CONFIDENCE
from bf16prof.reports.losses import LossGap, SeedGroup, loss_gaps, seed_groups, seed_of
from bf16prof.reports.units import NOT_FINITE, inert
from bf16prof.reports.views import CaseView
from bf16prof.step_records import LossSummary
from bf16prof.vocabulary import Component

_COLUMNS = {"final": "final", "mean": "mean", "deviation": "deviation", "tail": "at the end"}


def loss_table(views: Sequence[CaseView]) -> Table | None:
    """One row per case that has losses: its seeds, and each statistic, with an interval where there
    are several.

    What gaps are taken to stands in the caption where it is one for all.
    """
    groups = [group for group in seed_groups(views) if group.statistics]
    if not groups:
        return None
    gaps = {gap.group.indices: gap for gap in loss_gaps(groups)}
    references = list(dict.fromkeys(gap.reference.label for gap in gaps.values()))
    seed = "seeds" if any(len(group.views) > 1 for group in groups) else "seed"
    headers = ("case", seed, "steps", NOT_FINITE, *_COLUMNS.values(), "gap", "to")
    rows = tuple(_row(group, gaps.get(group.indices), len(references) > 1) for group in groups)
    return without_empty(Table(_title(groups, references), headers, rows))


def loss_notes(views: Sequence[CaseView]) -> list[str]:
    """What a reader of the losses has to know: who published them, which were not finite, and which
    are rounded."""
    sources = {view.label: inert(said.source, None) for view in views if (said := _published(view))}
    published = [
        f"{_joined([label for label, other in sources.items() if other == source])}: published in {source}, without the curves"
        for source in dict.fromkeys(sources.values())
    ]
    lost = any(found.lost for group in seed_groups(views) for found in group.statistics)
    of_part = ["A statistic of which a part was NaN or infinite is not known, and neither is a gap to it"] if lost else []
    return [*published, *of_part, *rounding_note(views)]


def rounding_note(views: Sequence[CaseView]) -> list[str]:
    """That the losses of some recipes are rounded to bf16, and gaps with them; nothing where none
    are."""
    coarse = list(dict.fromkeys(view.case.recipe for view in views if view.main.steps and _prints_bf16(view)))
    if not coarse:
        return []
    return [
        f"{_joined(coarse)}: the loss is computed from bf16 logits and printed in bf16, "
        "by each rank a multiple of 1/64 between 2 and 4, of 1/32 between 4 and 8; a gap is in part this rounding"
    ]


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _prints_bf16(view: CaseView) -> bool:
    """Whether a loss is printed in the bf16 of its logits. Under autocast `cross_entropy` returns
    fp32, and so do other people's models."""
    recipe = all_recipes().get(view.case.recipe)
    if recipe is None or not view.profile.get("model", {}).keys().isdisjoint({"hf_config", "factory"}):
        return False
    return recipe.at(view.case.zero_stage).dtypes[Component.PARAMETERS] == "bf16" and recipe.autocast == "none"


def _published(view: CaseView) -> LossSummary | None:
    """The statistics of a curve whose steps nobody published."""
    return None if view.main.steps else view.main.loss_summary


def _title(groups: Sequence[SeedGroup], references: Sequence[str]) -> str:
    to = ", and so is the gap" + (f" to {references[0]}" if len(references) == 1 else "") if references else ""
    paired = ", of a gap that of the differences seed by seed" if references else ""
    said = {
        "the deviation is the standard deviation over the steps": any(group.interval("deviation") for group in groups),
        f"at the end is the running mean over the last tenth of the steps{to}": any(group.interval("tail") for group in groups),
        f"± is the {CONFIDENCE:.0%} interval over seeds by Student's t{paired}": any(len(group.views) > 1 for group in groups),
    }
    return "Losses: " + "; ".join(text for text, true in said.items() if true) if any(said.values()) else "Losses"


def _row(group: SeedGroup, gap: LossGap | None, several: bool) -> tuple[Cell, ...]:
    published = _published(group.views[0])
    seeds = [None if published else seed_of(view.profile) for view in group.views]
    steps = sorted({found.steps for found in group.statistics})
    digits = published.decimals if published else 4
    return (
        Cell(group.label, style="label"),
        unknown_cell() if None in seeds else Cell(", ".join(map(str, seeds)), style="number"),
        Cell(" or ".join(map(str, steps)), steps[-1], "number"),
        _lost(group),
        *(_statistic(group, quantity, digits) for quantity in _COLUMNS),
        interval_cell(gap.gap if gap else None, digits, signed=True),
        Cell(gap.reference.label, style="label") if gap and several else unknown_cell(),
    )


def _statistic(group: SeedGroup, quantity: str, digits: int) -> Cell:
    known = group.interval(quantity)
    if known is None and quantity == "final" and any(found.lost for found in group.statistics):
        return Cell(NOT_FINITE, style="number bad")
    return interval_cell(known, digits)


def _lost(group: SeedGroup) -> Cell:
    """In how many steps the loss was not finite, and with several seeds in how many of them."""
    lost = [found.lost for found in group.statistics]
    if not any(lost):
        return unknown_cell()
    text = f"{sum(lost)} of {sum(found.steps for found in group.statistics)} steps"
    seeds = f", {sum(map(bool, lost))} of {len(lost)} seeds" if len(lost) > 1 else ""
    return Cell(text + seeds, sum(lost), "number bad")
