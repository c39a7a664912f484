"""Plans as one HTML page: for each number of GPUs the first choice in a few numbers, the table to choose from, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bf16prof.plans import Outlook, Plan
from bf16prof.records import MemoryRecord
from bf16prof.reports import palette, plan_rows
from bf16prof.reports.cells import Cell, Table, bytes_cell, unknown_cell, without_empty
from bf16prof.reports.page import page
from bf16prof.reports.summary import Tile
from bf16prof.reports.units import gib, inert, number, seconds, signed_bytes, whole
from bf16prof.reports.views import case_label, component_name

PLANS = ("plan", "learning", "offload", "micro-batch", "peak", "free", "tokens/s at most", "calibrated", "against the first")


def render(
    outlooks: Sequence[Outlook], first: Sequence[MemoryRecord | None], data: Mapping[str, Any], *, profile: str, parameters: int
) -> str:
    """The page of these outlooks. `first`: the record of the first plan of each; `data`: the document that the page carries."""
    return page(
        "plan.html.j2",
        data,
        name=inert(profile),
        parameters=whole(parameters),
        gpu=inert(outlooks[0].room.gpu),
        parts=[_part(outlook, record) for outlook, record in zip(outlooks, first, strict=True)],
    )


def _part(outlook: Outlook, record: MemoryRecord | None) -> dict[str, Any]:
    stages = outlook.stages
    is_more = stages is not None and stages.more_bytes > 0
    return {
        "id": f"gpus-{outlook.world_size}",
        "gpus": "1 GPU" if outlook.world_size == 1 else f"{outlook.world_size} GPUs",
        "tiles": _tiles(outlook),
        "lead": [plan_rows.room_text(outlook.room), *([] if outlook.plans else plan_rows.nearest_lines(outlook))],
        "plans": _plans(outlook.plans) if outlook.plans else _changes(outlook),
        "notes": [*(plan_rows.order_text(outlook) if outlook.plans else []), *plan_rows.left_out_text(outlook)],
        "peak": _peak(record) if record else None,
        "stages": _stages(outlook) if is_more else None,
        "advice": plan_rows.stage_lines(stages) if stages else [],
    }


def _tiles(outlook: Outlook) -> list[Tile]:
    if not outlook.plans:
        lacks = -(outlook.nearest.free_bytes if outlook.nearest else 0)
        return [Tile("Nothing fits", f"{gib(lacks)} too much", "the nearest combination", "bad"), *_fewest(outlook)]
    first, limits = outlook.plans[0], outlook.limits
    rate = f"step time at least {seconds(first.step_time_floor_s)}: a bound, no prediction"
    longest = "the model's longest" if limits.longest else "the longest that fits"
    return [
        Tile("First choice", inert(case_label(first.case)), plan_rows.plan_words(first).partition(", ")[2], "good"),
        Tile("Peak", gib(first.peak_bytes), f"in {first.peak_phase}, {gib(first.free_bytes)} free of {gib(outlook.room.bytes)}"),
        Tile("Tokens per second at most", number(first.tokens_per_s_at_most), rate),
        Tile("Micro-batch", str(first.micro_batch_size), f"{limits.micro_batch_size} fit"),
        Tile("Sequence", f"{first.sequence_length:,}", f"{limits.sequence_length:,} tokens: {longest}" if limits.sequence_length else ""),
        *_fewest(outlook),
    ]


def _fewest(outlook: Outlook) -> list[Tile]:
    return [
        Tile("Fewest GPUs", str(plan.case.world_size), plan_rows.fewest_words(plan).partition(", ")[2]) for plan in outlook.limits.fewest
    ]


def _plans(plans: Sequence[Plan]) -> Table:
    rows = [_plan(n, plan, plans[0]) for n, plan in enumerate(plans, 1)]
    return without_empty(Table("What fits, the first choice first", PLANS, tuple(rows)))


def _plan(rank: int, plan: Plan, first: Plan) -> tuple[Cell, ...]:
    inside, recompute = ", in zero.Init" if plan.zero_init else "", ", recompute" if plan.activation_checkpointing else ""
    calibrated = unknown_cell() if plan.tokens_per_s is None else Cell(number(plan.tokens_per_s), plan.tokens_per_s, "number")
    return (
        Cell(f"{rank}. ZeRO-{plan.case.zero_stage}, {inert(plan.case.recipe)}{inside}", rank),
        Cell(inert(plan.learning)),
        Cell(str(plan.case.offload)),
        Cell(f"{plan.micro_batch_size}{recompute}", plan.micro_batch_size, title=f"up to {plan.largest_micro_batch_size} fit"),
        bytes_cell(plan.peak_bytes, title=f"in {plan.peak_phase}"),
        bytes_cell(plan.free_bytes),
        Cell(number(plan.tokens_per_s_at_most), plan.tokens_per_s_at_most, "number"),
        calibrated,
        Cell(", ".join(plan_rows.against(plan, first)) if rank > 1 else ""),
    )


def _changes(outlook: Outlook) -> Table | None:
    rows = tuple(
        (
            Cell(inert(change.what, 120)),
            bytes_cell(change.saved_bytes),
            bytes_cell(change.plan.peak_bytes),
            Cell("yes" if change.plan.fits else "no", style="good" if change.plan.fits else "bad"),
            Cell(inert(change.flag, 300)),
        )
        for change in outlook.changes
    )
    return Table("What to change first: one change of the nearest", plan_rows.CHANGES, rows) if rows else None


def _peak(record: MemoryRecord) -> Table:
    rows = tuple(
        (Cell(component_name(component), colour=colour), bytes_cell(size), bytes_cell(record.components.get(component)))
        for component, colour in palette.COMPONENTS.items()
        if (size := record.peak_components.get(component))
    )
    caption = f"The first choice at its training peak: {gib(record.peak_allocated_bytes)} in {record.peak_phase}"
    return Table(caption, ("component", "at the peak", "between steps"), rows)


def _stages(outlook: Outlook) -> Table:
    assert outlook.stages is not None, "there is something to compare"
    rows = tuple(
        (
            Cell(inert(d.name), colour=palette.COMPONENTS[d.component]),
            bytes_cell(d.before_bytes),
            bytes_cell(d.after_bytes),
            Cell(signed_bytes(d.more_bytes), d.more_bytes, "number"),
        )
        for d in outlook.stages.differences
    )
    return Table(plan_rows.stage_title(outlook.stages), plan_rows.DIFFERENCES, rows)
