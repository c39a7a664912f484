"""Plans as CSV and Markdown: one row per plan, the first choice first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bf16prof.plans import Outlook, Plan
from bf16prof.records import Case
from bf16prof.reports import plan_rows
from bf16prof.reports.cells import Table
from bf16prof.reports.written import csv_text, markdown_list, markdown_table, markdown_text
from bf16prof.runs import rows_as_csv


def to_csv(outlooks: Sequence[Outlook]) -> str:
    """Every plan that fits. No text in it can be taken for a formula by a spreadsheet; what is not
    known is empty."""
    names = ["rank", *(f.name for f in dataclasses.fields(Case)), *(f.name for f in dataclasses.fields(Plan) if f.name != "case")]
    known = ({"rank": rank, **vars(plan.case), **vars(plan)} for outlook in outlooks for rank, plan in enumerate(outlook.plans, 1))
    return rows_as_csv(names, ([csv_text(row[name]) for name in names] for row in known))


def to_markdown(outlooks: Sequence[Outlook], profile: str, parameters: int, asked: str) -> str:
    """What the console says, number of GPUs by number of GPUs, under the line that says what was
    asked."""
    parts = [_text(asked) + "\n"]
    parts += [_table(plan_rows.size_rows(outlooks))] if len(outlooks) > 1 else []
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
    rows = [[_text(", ".join([cell.text, *cell.detail.splitlines()])) for cell in row] for row in found.rows]
    return markdown_table(found.headers, rows, plan_rows.LEFT)


def _list(lines: Sequence[str]) -> str:
    return markdown_list(map(_text, lines))


def _text(value: str) -> str:
    return markdown_text(value, None)
