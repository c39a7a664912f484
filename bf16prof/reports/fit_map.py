"""Maps of what fits: in each cell whether it does and by how much. Of a grid, for each recipe, GPUs
across and ZeRO stages down; of a plan, micro-batches across and sequence lengths down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.plans import Plan
from bf16prof.reports import palette
from bf16prof.reports.anchors import anchors
from bf16prof.reports.chosen import FEW
from bf16prof.reports.limit_lines import limit_of
from bf16prof.reports.units import gib, inert
from bf16prof.reports.verdict import STYLES, Said, Style, case_verdict
from bf16prof.reports.views import CaseView
from bf16prof.verdict import judge
from bf16prof.vocabulary import Offload, Verdict


@dataclass(frozen=True)
class MapCell:
    """A case of the map: what is left or lacks, the verdict, how strong its colour is, 0 to 1, and
    the id of what the page says of it (empty: nothing)."""

    text: str
    symbol: str
    style: Style
    strength: float
    words: str
    anchor: str


@dataclass(frozen=True)
class FitMap:
    """A map: what the rows and the columns are called, and a row of cells for each name; `None`
    where nothing is known."""

    title: str
    caption: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[MapCell | None, ...]], ...]


def fit_maps(views: Sequence[CaseView]) -> list[FitMap]:
    """The maps of a grid, one for each recipe; none where there are few cases or one number of
    GPUs, or where a recipe has two of the same stage and size."""
    judged = [(view, anchor, said) for view, anchor in zip(views, anchors(views), strict=True) if (said := case_verdict(view))]
    groups: dict[str, dict[tuple[int, int], MapCell]] = {}
    for view, anchor, said in judged:
        cells = groups.setdefault(_title(view, views), {})
        place = (view.case.zero_stage, view.case.world_size)
        if place in cells:
            return []
        cells[place] = _cell(view, anchor, said)
    if len(judged) <= FEW or len({view.case.world_size for view, *_ in judged}) < 2:
        return []
    return [_map(title, "by ZeRO stage and number of GPUs", "ZeRO", cells) for title, cells in groups.items()]


def plan_maps(around: Sequence[Plan], room_bytes: int) -> list[FitMap]:
    """A plan at other micro-batches and sequence lengths: a map without and one with activation
    checkpointing, where both are known.

    `room_bytes`: what the allocator may hold.
    """
    groups: dict[str, dict[tuple[int, int], MapCell]] = {}
    for plan in around:
        title = "activations recomputed (checkpointing)" if plan.activation_checkpointing else "no activation checkpointing"
        said = Verdict.DOES_NOT_FIT if plan.verdict is None else plan.verdict
        words = f"{plan.sequence_length:,} tokens, micro-batch {plan.micro_batch_size}: {said}, peak {gib(plan.peak_bytes)}"
        cell = _judged_cell(plan.free_bytes, room_bytes, STYLES[said], words)
        groups.setdefault(title, {})[plan.sequence_length, plan.micro_batch_size] = cell
    return [_map(title, "by sequence length and micro-batch", "tokens", cells) for title, cells in groups.items()]


def _map(title: str, by: str, corner: str, cells: dict[tuple[int, int], MapCell]) -> FitMap:
    """The map of cells by (row, column)."""
    rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
    caption = f"{title}: GiB left of what the allocator may hold, {by}"
    named = tuple((f"{row:,}", tuple(cells.get((row, column)) for column in columns)) for row in rows)
    return FitMap(title, caption, corner, tuple(f"{column:,}" for column in columns), named)


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
    return _judged_cell(free, limit, said.style, f"{view.label}: {said.text}", anchor)


def _judged_cell(free: int | None, limit: int | None, style: Style, words: str, anchor: str = "") -> MapCell:
    strength = min(1.0, abs(free) / limit) if free is not None and limit else 0.5
    number = "" if free is None else f"{free / 2**30:+.{0 if abs(free) >= 100 * 2**30 else 1}f}"
    return MapCell(number, palette.SYMBOLS[style], style, round(strength, 3), words, anchor)
