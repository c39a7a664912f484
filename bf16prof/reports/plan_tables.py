"""Plans as CSV and Markdown: one row per plan, the first choice first."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from bf16prof.plans import Outlook, Plan
from bf16prof.records import Case
from bf16prof.reports import plan_rows
from bf16prof.reports.cells import Cell, Table
from bf16prof.reports.tables import csv_text, markdown_text


def to_csv(outlooks: Sequence[Outlook]) -> str:
    """Every plan that fits. No text in it can be taken for a formula by a spreadsheet; what is not known is empty."""
    names = ["rank", *(f.name for f in dataclasses.fields(Case)), *(f.name for f in dataclasses.fields(Plan) if f.name != "case")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for outlook in outlooks:
        for rank, plan in enumerate(outlook.plans, 1):
            known: dict[str, Any] = {"rank": rank, **vars(plan.case), **vars(plan)}
            writer.writerow(csv_text(known[name]) for name in names)
    return out.getvalue()


def to_markdown(outlooks: Sequence[Outlook], profile: str, parameters: int) -> str:
    """What the console says, number of GPUs by number of GPUs."""
    parts = [_table(plan_rows.size_rows(outlooks))] if len(outlooks) > 1 else []
    return "\n".join(parts + [part for outlook in outlooks for part in _outlook(outlook, profile, parameters)])


def _outlook(outlook: Outlook, profile: str, parameters: int) -> list[str]:
    parts = [f"## {_text(plan_rows.title(outlook, profile, parameters))}\n", _text(plan_rows.room_text(outlook.room)) + "\n"]
    if outlook.plans:
        first = plan_rows.plan_words(outlook.plans[0])
        parts += [_table(plan_rows.plan_rows(outlook.plans)), _list(plan_rows.order_text(outlook))]
        parts += [f"First choice: {_text(first)}\n", _list(plan_rows.limit_lines(outlook.plans[0], outlook.limits))]
    else:
        parts += [_list(plan_rows.nearest_lines(outlook)), _table(plan_rows.change_rows(outlook))]
    if outlook.stages is not None:
        if outlook.stages.more_bytes > 0:
            differences = plan_rows.difference_rows(outlook.stages)
            parts += [_text(differences.caption) + "\n", _table(differences)]
        parts.append(_list(plan_rows.stage_lines(outlook.stages)))
    return [*parts, _list(plan_rows.left_out_text(outlook))]


def _table(found: Table) -> str:
    lines = [found.headers, ["---"] * len(found.headers), *([_cell(cell) for cell in row] for row in found.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(cell: Cell) -> str:
    return _text(", ".join([cell.text, *cell.detail.splitlines()]))


def _list(lines: Sequence[str]) -> str:
    return "".join(f"* {_text(line)}\n" for line in lines)


def _text(value: str) -> str:
    return markdown_text(value, None)
