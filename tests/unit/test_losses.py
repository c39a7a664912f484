"""The statistics of losses: intervals, the running mean, what counts as another seed, and the gap
to a reference."""

from __future__ import annotations

import dataclasses
import io
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fixtures
from rich.console import Console

from bf16prof.records import Case, MemoryRecord
from bf16prof.reports.console import reconciliation
from bf16prof.reports.html import render
from bf16prof.reports.intervals import t_interval, t_quantile
from bf16prof.reports.loss_figure import loss_curves, loss_differences, mean_curve
from bf16prof.reports.loss_table import loss_notes, loss_table
from bf16prof.reports.losses import LossStatistics, loss_gaps, loss_statistics, running_mean, seed_groups
from bf16prof.reports.plots import step_ticks
from bf16prof.reports.price_figure import gap
from bf16prof.reports.series import case_styles
from bf16prof.reports.tables import frame, to_markdown
from bf16prof.reports.views import loss_text, run_names, run_views
from bf16prof.runs import Run, replace
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import Source

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 120: 1.980}
"""The two-sided 95 % points of Student's t, as textbooks print them."""


@pytest.mark.parametrize("freedom", T_95)
def test_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(T_95[freedom], abs=0.0005)


def test_one_degree_of_freedom_is_the_cauchy_distribution() -> None:
    assert t_quantile(0.9, 1) == pytest.approx(math.tan(0.45 * math.pi))


def test_an_interval_is_t_times_the_standard_error() -> None:
    values = [2.0, 2.5, 4.5]

    found = t_interval(values)

    assert found.mean == 3.0
    assert found.half_width == pytest.approx(4.302653 * statistics.stdev(values) / math.sqrt(3), rel=1e-6)
    assert not found.excludes_zero
    assert t_interval([1.0, 1.001]).excludes_zero
    assert (t_interval([1.5]).half_width, t_interval([1.5]).text()) == (None, "1.500")
    assert t_interval([1.0, 1.0]).text(1) == "1.0 ± 0.0"
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_a_curve_has_a_last_loss_a_mean_a_deviation_and_a_running_mean() -> None:
    values = [float(40 - i) for i in range(40)]

    found = loss_statistics(measured(values))

    assert found is not None
    assert (found.steps, found.final, found.mean, found.window, found.tail) == (40, 1.0, 20.5, 4, 2.5)
    assert found.deviation == statistics.stdev(values)
    assert loss_statistics(measured([])) is None
    assert running_mean([(3, 1.0), (4, 2.0), (6, 6.0)], 2) == [(4, 1.5), (6, 4.0)]


def test_runs_that_differ_in_the_seed_only_are_one_group() -> None:
    views = run_views([a_run([3.0], 1), a_run([4.0], 2), a_run([5.0], 3, lr=1e-4), a_run([6.0], 1), a_run([7.0], None)])

    groups = seed_groups(views)

    assert [group.indices for group in groups] == [(0, 1), (2,), (3,), (4,)]
    assert groups[0].interval("final") == t_interval([3.0, 4.0])
    assert len({group.label for group in groups}) == 4, "what is not one group has another name"


def test_the_gap_is_taken_seed_by_seed() -> None:
    """The seeds are 1 apart, the recipes 0.1 and 0.3: unpaired, the interval would hold 0 by
    far."""
    runs = [a_run([base], seed, "fp32") for seed, base in ((1, 2.0), (2, 3.0))]
    runs += [a_run([base], seed, "bf16-pure") for seed, base in ((1, 2.1), (2, 3.3), (9, 9.0))]
    runs += [a_run([5.0], 1, "bf16-full", lr=1e-4)]

    (found,) = loss_gaps(seed_groups(run_views(runs)))

    assert (found.group.recipe, found.reference.recipe) == ("bf16-pure", "fp32")
    assert found.gap.mean == pytest.approx(0.2)
    assert found.gap.half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert found.gap.count == 2


def test_without_fp32_the_reference_is_the_next_with_a_master_copy() -> None:
    runs = [a_run([2.0], 1, recipe) for recipe in ("bf16-pure", "autocast-fp32", "bf16-fp32-master")]

    found = loss_gaps(seed_groups(run_views(runs)))

    assert {gap.reference.recipe for gap in found} == {"bf16-fp32-master"}
    assert [gap.group.recipe for gap in found] == ["bf16-pure", "autocast-fp32"]
    assert loss_gaps(seed_groups(run_views(runs[:1]))) == []


def test_the_figure_lays_seeds_over_each_other_under_their_running_mean() -> None:
    ramp = [float(i) for i in range(20)]
    views = run_views([a_run(ramp, 1), a_run([2 + loss for loss in ramp], 2)])

    drawn = loss_curves(views)

    assert mean_curve(seed_groups(views)[0]) == [(i, i + 0.5) for i in range(1, 20)]
    assert drawn is not None
    assert drawn.series == (0, 1, 0)
    assert "running mean over 2 seeds" in drawn.spec


def test_curves_that_coincide_are_told_apart_by_their_difference() -> None:
    curves = {"fp32": 0.0, "bf16-pure": 0.001}
    runs = [a_run([3.0 - step / 10 + extra for step in range(5)], 1, recipe) for recipe, extra in curves.items()]
    drawn = loss_differences(run_views(runs))

    assert drawn is not None
    (trace,) = drawn.traces
    assert trace["y"] == pytest.approx([0.001] * 5)
    assert trace["meta"] == 1, "the legend of the case hides it"
    assert "less zero3-w2-fp32" in trace["name"]
    assert loss_differences(run_views(runs[:1])) is None


def test_the_table_and_the_figure_of_gaps_name_the_reference() -> None:
    runs = [a_run([2.0 + 0.1 * seed + extra], seed, recipe) for recipe, extra in (("fp32", 0), ("bf16-pure", 0.25)) for seed in (1, 2)]
    views = run_views(runs)

    table, drawn = loss_table(views), gap(views)

    assert table is not None
    assert [row[-1].text for row in table.rows][1] == "+0.2500 ± 0.0000"
    assert "the gap to zero3-w2-fp32; ± is" in table.caption
    assert "Student's t" in table.caption
    others = [a_run([3.0 + extra], 1, recipe, lr=1e-4) for recipe, extra in (("fp32", 0), ("bf16-pure", 0.5))]
    two = loss_table(run_views([*runs, *others]))
    assert two is not None
    assert two.headers[-2:] == ("gap", "to"), "where there is more than one reference"
    assert drawn is not None
    assert "loss gap to fp32" in drawn.spec
    assert "+0.2500" in render(runs)
    assert "0.2500" in to_markdown(runs)
    assert gap(views[:1]) is None
    more = run_views([a_run([2.0], 1, "bf16-full", lr=1e-4), *runs])
    shown, styles = gap(more), case_styles(more)
    assert shown is not None
    assert [colour for _, _, colour in shown.legend] == [styles[1][0], styles[3][0]], "a recipe has one colour in every figure"


NAN = float("nan")


def test_a_diverged_run_has_no_statistics_of_its_finite_part() -> None:
    early, late = loss_statistics(measured([5.0, NAN, *[4.0] * 18])), loss_statistics(measured([5.0, NAN]))

    assert early == LossStatistics(20, 4.0, None, None, 2, 4.0, lost=1)
    assert late == LossStatistics(2, None, None, None, 1, None, lost=1)
    assert loss_text(measured([5.516, *[NAN] * 4])) == "5.516 -> not finite (4 of 5 steps)"
    assert loss_text(measured([5.0, NAN, 4.0])) == "5 -> 4 (not finite in 1 of 3 steps)"
    assert loss_text(measured([NAN, NAN])) == "not finite (2 of 2 steps)"
    assert running_mean([(0, 1.0), (1, None), (2, 3.0), (3, 5.0)], 2) == [(1, None), (2, None), (3, 4.0)]


def test_one_diverged_seed_leaves_no_mean_of_the_others_and_no_gap() -> None:
    runs = [a_run([2.0, loss], seed, recipe) for recipe, loss in (("fp32", 2.0), ("bf16-pure", NAN)) for seed in (1, 2)]
    runs[3] = a_run([2.0, 3.0], 2, "bf16-pure")
    groups = seed_groups(run_views(runs))

    assert loss_gaps(groups) == []
    assert [group.interval("final") is None for group in groups] == [False, True]
    text, page = printed(runs), render(runs)
    assert [cell.text for row in (loss_table(run_views(runs)) or pytest.fail()).rows for cell in row[4:5]] == [
        "2.0000 ± 0.0000",
        "not finite",
    ]
    for shown in (text, page, to_markdown(runs)):
        assert "not finite" in shown
        assert "1 of 4 steps, 1 of 2 seeds" in shown
    assert "in 1 of 4 cases" in page
    assert frame(runs)["steps_loss_not_finite"].tolist() == [0, 0, 1, 0]


def test_steps_of_which_a_log_says_no_loss_are_not_lost() -> None:
    """A log that prints every tenth loss, beside timers that know every step; and one that prints a
    NaN."""
    steps = tuple(StepRecord(i, 5.0 - i if i in (0, 2) else None, 0.1, None) for i in range(3))
    quiet = dataclasses.replace(measured([]), source=Source.IMPORT, steps=steps)
    loud = dataclasses.replace(quiet, steps=(*steps[:2], StepRecord(2, None, 0.1, None, loss_not_finite=True)))

    assert loss_text(quiet) == "5 -> 3"
    assert loss_text(loud) == "5 -> not finite (1 of 2 steps)"


def test_it_is_said_which_losses_are_printed_in_bf16() -> None:
    views = run_views([a_run([3.0], 1, recipe) for recipe in ("fp32", "bf16-full", "bf16-full-autocast", "bf16-pure")])
    (said,) = loss_notes(views)

    assert said.startswith("bf16-full and bf16-pure: the loss is computed from bf16 logits")
    assert "1/64 between 2 and 4, of 1/32 between 4 and 8" in said
    page = render([a_run([3.0], 1, recipe) for recipe in ("fp32", "bf16-full")])
    assert page.count("bf16-full: the loss is computed from bf16 logits") == 2, "below the table, and below the figure of gaps"
    foreign = dataclasses.replace(views[1], profile={"model": {"hf_config": "config.json"}})
    assert loss_notes([views[0], foreign]) == [], "transformers computes the loss in fp32"


def test_runs_of_one_name_are_told_by_their_folders() -> None:
    runs = [dataclasses.replace(a_run([3.0], 1), path=Path("runs") / folder) for folder in ("early", "late", "late")]

    assert run_names(runs[:1]) == ["sweep-2026-03-01"]
    assert run_names(runs[:2]) == ["early", "late"]
    assert run_names(runs) == ["early", "sweep-2026-03-01 #2", "sweep-2026-03-01 #3"]


def test_short_runs_are_ticked_at_each_step() -> None:
    assert step_ticks([0.75, 3.75]) == {"tickformat": "d", "dtick": 1}
    assert step_ticks(range(11)) == {"tickformat": "d"} == step_ticks([])


def test_the_terminal_shows_intervals_where_there_are_seeds() -> None:
    runs = [a_run([2.0 + seed], seed) for seed in (1, 2)]

    assert "3.5000 ± 6.3531" in printed(runs)
    assert "Losses" not in printed(runs[:1])


def printed(runs: list[Run]) -> str:
    console = Console(width=400, file=io.StringIO())
    reconciliation(runs, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def measured(losses: list[float], recipe: str = "bf16-full") -> MemoryRecord:
    steps = tuple(StepRecord(i, loss, None, None) for i, loss in enumerate(losses))
    return dataclasses.replace(fixtures.measure(Case("gpt2-1.5b", 3, 2, recipe)), steps=steps)


def test_one_seed_for_each_case_is_a_seed_and_several_are_seeds() -> None:
    one = loss_table(run_views([a_run([2.0, 1.9], 7, "fp32")]))
    several = loss_table(run_views([a_run([2.0, 1.9], seed, "fp32") for seed in (7, 8)]))

    assert one is not None
    assert several is not None
    assert (one.headers[1], one.rows[0][1].text) == ("seed", "7")
    assert (several.headers[1], several.rows[0][1].text) == ("seeds", "7, 8")


def a_run(losses: list[float], seed: int | None, recipe: str = "bf16-full", lr: float = 1e-3) -> Run:
    workload: dict[str, Any] = {"data": "pydoc"} if seed is None else {"data": "pydoc", "seed": seed}
    return replace(fixtures.run([measured(losses, recipe)]), profile={"workload": workload, "optimizer": {"lr": lr}})
