"""Plans on a console, in Markdown and on a page: the same rows, whichever way they are laid out."""

from __future__ import annotations

import dataclasses
import html
import io

import report_fixtures as fixtures
from rich.console import Console

from bf16prof.plans import EQUAL, Change, Difference, Limits, Outlook, Plan, Room, StageComparison
from bf16prof.records import Case
from bf16prof.reports import plan_html, plan_rows, plan_tables
from bf16prof.reports.cells import Table
from bf16prof.reports.console import plan_view
from bf16prof.reports.fit_map import plan_maps
from bf16prof.vocabulary import Component, Offload, Phase, Verdict

GIB = 2**30
PLAN = Plan(
    Case("p", 2, 8, "bf16-full"), sequence_length=4096, micro_batch_size=4, largest_micro_batch_size=7, gradient_accumulation_steps=1,
    train_batch_size=32, activation_checkpointing=True, zero_init=False, learning="bf16 only", peak_bytes=50 * GIB,
    peak_phase=Phase.BACKWARD, free_bytes=5 * GIB, host_bytes=0, host_bytes_per_node=0,
    step_time_floor_s=1.0, tokens_per_s_at_most=131_072.0, verdict=Verdict.FITS, reserved_bytes=52 * GIB,
)  # fmt: skip
ROOM = Room("h100-80gb", 79 * GIB, (), 0.3)


def outlook(*plans: Plan, changes: int = 0, differences: tuple[Difference, ...] = ()) -> Outlook:
    lower = dataclasses.replace(PLAN, free_bytes=-GIB)
    tried = tuple(Change(f"change {n}", f"--set x={n}", lower, GIB - n) for n in range(changes))
    stages = StageComparison(PLAN, PLAN, 1, differences) if differences else None
    return Outlook(8, ROOM, plans, True, 12, (), Limits(()), None if plans else lower, tried, stages)


def shown(found: Outlook) -> list[str]:
    """The outlook on a console, in Markdown and as a page without its data."""
    console = Console(file=io.StringIO(), width=10_000)
    record = fixtures.estimate(PLAN.case) if found.plans else None
    plan_view(found, console, profile="p", parameters=1, record=record, verbose=True)
    assert isinstance(console.file, io.StringIO)
    page = plan_html.render([plan_html.PlanPart(found, record)], {}, profile="p", parameters=1, asked="")
    return [console.file.getvalue(), plan_tables.to_markdown([found], "p", 1, ""), html.unescape(page)]


def test_the_first_choice_at_other_sizes_is_a_map() -> None:
    tight = dataclasses.replace(PLAN, micro_batch_size=2, verdict=Verdict.TIGHT, free_bytes=-GIB)
    long = dataclasses.replace(PLAN, sequence_length=2 * PLAN.sequence_length, verdict=None, free_bytes=-90 * GIB)
    recomputed = dataclasses.replace(PLAN, activation_checkpointing=not PLAN.activation_checkpointing)
    first, second = plan_maps([PLAN, tight, long, recomputed], 79 * GIB)

    assert first.columns == ("2", "4")
    assert [name for name, _ in first.rows] == [f"{PLAN.sequence_length:,}", f"{2 * PLAN.sequence_length:,}"]
    assert {cell.symbol for _, cells in first.rows for cell in cells if cell} == {"✓", "!", "✗"}
    assert len(second.rows) == len(second.columns) == 1


def texts(table: Table) -> list[str]:
    return [text for row in table.rows for cell in row for text in (cell.text, *cell.detail.splitlines()) if text]


def test_plans_are_the_same_rows_everywhere() -> None:
    slower = dataclasses.replace(
        PLAN, case=dataclasses.replace(PLAN.case, zero_stage=3, offload=Offload.OPTIMIZER), zero_init=True, free_bytes=9 * GIB,
        reserved_bytes=48 * GIB, host_bytes=3 * GIB, tokens_per_s=99_000.0,
    )  # fmt: skip
    rows = plan_rows.plan_rows([PLAN, slower])

    assert rows.headers == plan_rows.PLANS
    assert {"recompute", "up to 7", "in zero.Init", "plus the CPU's time", "+4.00 GiB free", "+3.00 GiB on the host"} <= set(texts(rows))
    for page in shown(outlook(PLAN, slower)):
        assert [text for text in texts(rows) if text not in page] == []


def test_one_screen_has_a_row_for_each_plan_in_one_table() -> None:
    slower = dataclasses.replace(
        PLAN, case=dataclasses.replace(PLAN.case, zero_stage=3, offload=Offload.OPTIMIZER_AND_PARAMETERS), free_bytes=9 * GIB
    )
    console = Console(file=io.StringIO(), width=80)

    plan_view(outlook(PLAN, slower), console, profile="p", parameters=1, record=fixtures.estimate(PLAN.case))

    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    first, second = (line.split() for line in lines if line.startswith((" 1 ", " 2 ")))
    assert first[1:3] == [str(PLAN.case.zero_stage), PLAN.case.recipe]
    assert second[1:4] == ["3", PLAN.case.recipe, "both"]
    assert second[-3:] != first[-3:]
    assert any(line.startswith("✓ On 8 x h100-80gb: ZeRO-") for line in lines), "the verdict comes first"


def test_what_a_plan_may_use_is_what_it_takes_and_what_it_leaves() -> None:
    """A plan that was tried keeps no margin."""
    tried = dataclasses.replace(PLAN, is_tried=True, free_bytes=13 * GIB)

    assert "52.00 GiB reserved of the 57.00 GiB that a plan may use; predicted" in plan_rows.first_choice(outlook(PLAN))
    assert "52.00 GiB reserved of the 65.00 GiB that the allocator may reserve; a dry run" in plan_rows.first_choice(outlook(tried))
    assert plan_rows.against(tried, PLAN) == ["as fast"], "neither takes more"


def test_columns_that_say_nothing_are_left_out() -> None:
    assert set(plan_rows.PLANS) - set(plan_rows.plan_rows([PLAN]).headers) == {"offload", "calibrated"}


def test_only_so_many_changes_are_shown() -> None:
    for page in shown(outlook(changes=plan_rows.MOST_CHANGES + 1)):
        assert f"change {plan_rows.MOST_CHANGES - 1}" in page
        assert f"change {plan_rows.MOST_CHANGES}" not in page


def test_differences_that_explain_nothing_are_left_out() -> None:
    large = Difference(Component.BUFFERS, "a bucket", GIB, 3 * GIB)
    small = Difference(Component.WORKSPACE, "a trifle", 0, plan_rows.SMALL - 1)

    for page in shown(outlook(PLAN, differences=(large, small))):
        assert "buffers: a bucket" in page
        assert "+2.00 GiB" in page
        assert "a trifle" not in page


def test_how_close_counts_as_equal_is_said_as_it_is_applied() -> None:
    assert f"within {100 * EQUAL:.0f} % counts as equal" in " ".join(plan_rows.order_text(outlook(PLAN)))
