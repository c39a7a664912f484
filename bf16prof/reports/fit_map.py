"""The map of a grid: for each recipe GPUs across and ZeRO stages down, and in each cell whether it fits and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.records import Offload
from bf16prof.reports import palette
from bf16prof.reports.anchors import anchors
from bf16prof.reports.chosen import FEW
from bf16prof.reports.limit_lines import limit_of
from bf16prof.reports.units import inert
from bf16prof.reports.verdict import Said, Style, case_verdict
from bf16prof.reports.views import CaseView
from bf16prof.verdict import judge


@dataclass(frozen=True)
class MapCell:
    """A case of the map: what is left or lacks, the verdict, and how strong its colour is, 0 to 1."""

    text: str
    symbol: str
    style: Style
    strength: float
    words: str
    anchor: str


@dataclass(frozen=True)
class FitMap:
    """One recipe: numbers of GPUs across, and a row of cells for each ZeRO stage."""

    title: str
    gpus: tuple[int, ...]
    rows: tuple[tuple[int, tuple[MapCell | None, ...]], ...]


def fit_maps(views: Sequence[CaseView]) -> list[FitMap]:
    """The maps of a grid, one for each recipe; none where there are few cases or one number of GPUs, or where a recipe has
    two of the same stage and size."""
    judged = [(view, anchor, said) for view, anchor in zip(views, anchors(views), strict=True) if (said := case_verdict(view))]
    groups: dict[str, dict[tuple[int, int], MapCell]] = {}
    for view, anchor, said in judged:
        cells = groups.setdefault(_title(view, views), {})
        place = (view.case.zero_stage, view.case.world_size)
        if place in cells:
            return []
        cells[place] = _cell(view, anchor, said)
    gpus = tuple(sorted({view.case.world_size for view, *_ in judged}))
    if len(judged) <= FEW or len(gpus) < 2:
        return []
    return [FitMap(title, gpus, _rows(cells, gpus)) for title, cells in groups.items()]


def _rows(cells: dict[tuple[int, int], MapCell], gpus: Sequence[int]) -> tuple[tuple[int, tuple[MapCell | None, ...]], ...]:
    stages = sorted({stage for stage, _ in cells})
    return tuple((stage, tuple(cells.get((stage, size)) for size in gpus)) for stage in stages)


def _title(view: CaseView, views: Sequence[CaseView]) -> str:
    """What a map has in common: the recipe, and what else differs among the cases."""
    case = view.case
    parts = [inert(case.recipe)]
    parts += [f"offload {case.offload}"] if case.offload is not Offload.NONE else []
    parts += [inert(case.profile)] if len({one.case.profile for one in views}) > 1 else []
    parts += [str(view.device)] if len({one.device for one in views}) > 1 else []
    return ", ".join(parts)


def _cell(view: CaseView, anchor: str, said: Said) -> MapCell:
    found = next((one for record in view.records.values() if (one := judge(record))), None)
    free, limit = (found.free_bytes if found else None), limit_of(view)
    strength = min(1.0, abs(free) / limit) if free is not None and limit else 0.5
    number = "" if free is None else f"{free / 2**30:+.{0 if abs(free) >= 100 * 2**30 else 1}f}"
    return MapCell(number, palette.SYMBOLS[said.style], said.style, round(strength, 3), f"{view.label}: {said.text}", anchor)
