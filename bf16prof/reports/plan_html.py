"""Plans as one HTML page: for each number of GPUs the first choice in a few numbers, the table to
choose from, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.plans import Outlook, Plan
from bf16prof.records import MemoryRecord
from bf16prof.reports import palette, plan_rows
from bf16prof.reports.cells import Cell, Table, bytes_cell
from bf16prof.reports.fit_map import plan_maps
from bf16prof.reports.page import page
from bf16prof.reports.summary import Tile
from bf16prof.reports.units import gib, inert, number, seconds, whole
from bf16prof.reports.views import case_label, component_name

FEW = 10
"""So many plans stand on the page; all of them are folded away below."""


@dataclass(frozen=True)
class PlanPart:
    """What the page shows of a number of GPUs: the outlook, the record of its first plan, and that
    plan at other batches and lengths."""

    outlook: Outlook
    first: MemoryRecord | None = None
    around: tuple[Plan, ...] = ()


def render(parts: Sequence[PlanPart], data: Mapping[str, Any], *, profile: str, parameters: int, asked: str) -> str:
    """The page of these numbers of GPUs. `data`: the document that the page carries; `asked`: the
    line that says what was asked (`asked.planned_line`).
    """
    return page(
        "plan.html.j2",
        data,
        name=inert(profile),
        parameters=whole(parameters),
        gpu=inert(parts[0].outlook.room.gpu),
        asked=asked,
        parts=[_part(part) for part in parts],
    )


def _part(part: PlanPart) -> dict[str, Any]:
    outlook, record, stages, plans = part.outlook, part.first, part.outlook.stages, part.outlook.plans
    return {
        "id": f"gpus-{outlook.world_size}",
        "gpus": "1 GPU" if outlook.world_size == 1 else f"{outlook.world_size} GPUs",
        "tiles": _tiles(outlook),
        "lead": [plan_rows.room_text(outlook.room), *([] if outlook.plans else plan_rows.nearest_lines(outlook))],
        "plans": plan_rows.plan_rows(plans[:FEW]) if plans else plan_rows.change_rows(outlook) if outlook.changes else None,
        "all_plans": plan_rows.plan_rows(plans) if len(plans) > FEW else None,
        "notes": [*(plan_rows.order_text(outlook) if plans else []), *plan_rows.left_out_text(outlook)],
        "maps": plan_maps(part.around, outlook.room.bytes),
        "peak": _peak(record) if record else None,
        "stages": plan_rows.difference_rows(stages) if stages and stages.more_bytes > 0 else None,
        "advice": plan_rows.stage_lines(stages) if stages else [],
    }


def _tiles(outlook: Outlook) -> list[Tile]:
    if not outlook.plans:
        lacks = -(outlook.nearest.free_bytes if outlook.nearest else 0)
        return [Tile("Nothing fits", f"{gib(lacks)} too much", "the nearest combination", "bad"), *_fewest(outlook)]
    first, limits = outlook.plans[0], outlook.limits
    floor = first.step_time_floor_s
    rate = "the GPU's speed is not known" if floor is None else f"step time at least {seconds(floor)}: a bound, no prediction"
    longest = "the model's longest" if limits.longest else "the longest that fits"
    return [
        Tile("First choice", inert(case_label(first.case)), plan_rows.plan_words(first).partition(", ")[2], "good"),
        Tile("Peak", gib(first.peak_bytes), f"in {first.peak_phase}, {gib(first.free_bytes)} free of {gib(outlook.room.bytes)}"),
        Tile("Tokens per second at most", number(first.tokens_per_s_at_most), rate),
        Tile("Micro-batch", str(first.micro_batch_size), f"{limits.micro_batch_size} fit" if limits.micro_batch_size else ""),
        Tile("Sequence", f"{first.sequence_length:,}", f"{limits.sequence_length:,} tokens: {longest}" if limits.sequence_length else ""),
        *_fewest(outlook),
    ]


def _fewest(outlook: Outlook) -> list[Tile]:
    return [
        Tile("Fewest GPUs", str(plan.case.world_size), plan_rows.fewest_words(plan).partition(", ")[2]) for plan in outlook.limits.fewest
    ]


def _peak(record: MemoryRecord) -> Table:
    rows = tuple(
        (Cell(component_name(component), colour=colour), bytes_cell(size), bytes_cell(record.components.get(component)))
        for component, colour in palette.COMPONENTS.items()
        if (size := record.peak_components.get(component))
    )
    caption = f"The first choice at its training peak: {gib(record.peak_allocated_bytes)} in {record.peak_phase}"
    return Table(caption, ("component", "at the peak", "between steps"), rows)
