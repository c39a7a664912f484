"""One screen of an answer on a terminal: what was asked, the verdict, the bar, the table."""

from __future__ import annotations

import dataclasses
import io

import pytest
import report_fixtures as fixtures
from rich.console import Console

from bf16prof.records import MemoryRecord
from bf16prof.reports.console import outcome
from bf16prof.reports.console.bar import memory_bar
from bf16prof.reports.palette import COMPONENTS, LETTERS
from bf16prof.runs import Run
from bf16prof.vocabulary import Component, Source

GIB = 2**30
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128)
RUNS = (fixtures.run, fixtures.simulated_run, fixtures.failed_run, fixtures.hostile_run, fixtures.extreme_run)


def printed(run: Run, width: int = 80) -> str:
    """What a terminal of that width shows, without colours."""
    console = Console(file=io.StringIO(), width=width, height=25, highlight=False)
    outcome([run], console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def bar(parts: dict[Component, int], total: int, limit: int | None, width: int = 61) -> str:
    """The first line of a bar."""
    console = Console(file=io.StringIO(), width=width, height=25, highlight=False)
    memory_bar(parts, total, limit, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()[0]


def predicted(which: MemoryRecord) -> MemoryRecord:
    """An estimate that misses the peak by a thousandth."""
    peak = which.peak_allocated_bytes or 0
    return dataclasses.replace(which, source=Source.ESTIMATE, steps=(), peak_allocated_bytes=peak + peak // 1000)


class TestBar:
    def test_letters_are_shares_of_the_limit(self) -> None:
        parts = {Component.PARAMETERS: 10 * GIB, Component.ACTIVATIONS: 20 * GIB}
        assert bar(parts, 30 * GIB, 60 * GIB) == "P" * 10 + "A" * 20 + "." * 30 + "|"

    def test_what_does_not_fit_goes_on_behind_the_limit(self) -> None:
        line = bar({Component.ACTIVATIONS: 60 * GIB}, 60 * GIB, 20 * GIB)
        assert line == "A" * 20 + "|" + "A" * 40

    def test_bytes_that_nobody_tells_apart_are_marked(self) -> None:
        assert bar({Component.PARAMETERS: GIB}, 2 * GIB, None) == "P" * 30 + "?" * 30

    def test_of_rounding_no_letter_is_lost_or_added(self) -> None:
        parts = dict.fromkeys(Component, GIB // 7)
        assert len(bar(parts, sum(parts.values()), None)) == 60

    def test_every_component_has_a_letter_of_its_own(self) -> None:
        assert len(set(LETTERS.values())) == len(Component)

    def test_letters_stand_on_the_colour_of_their_component(self) -> None:
        console = Console(file=io.StringIO(), width=61, height=25, force_terminal=True, color_system="truecolor", highlight=False)
        memory_bar({Component.PARAMETERS: GIB}, GIB, None, console)
        assert isinstance(console.file, io.StringIO)
        red, green, blue = (int(COMPONENTS[Component.PARAMETERS][i : i + 2], 16) for i in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}" in console.file.getvalue().splitlines()[0]


class TestOutcome:
    def test_the_order_is_that_of_the_questions(self) -> None:
        text = printed(fixtures.run([fixtures.simulate(fixtures.case())]))
        found = [text.index(part) for part in ("fits h100-80gb:", "at the training peak, in backward:", "| limit", "verdict\n")]
        assert found == sorted(found)

    @pytest.mark.parametrize("width", [60, 80, 120])
    @pytest.mark.parametrize(
        "made", [fixtures.run, fixtures.simulated_run, fixtures.failed_run, fixtures.hostile_run, fixtures.extreme_run]
    )
    def test_no_line_is_wider_than_the_terminal(self, made: object, width: int) -> None:
        text = printed(made(), width)  # type: ignore[operator]
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text

    def test_a_measurement_has_its_prediction_beside_it_within_80_columns(self) -> None:
        measured = [fixtures.measure(case) for case in fixtures.cases()]
        text = printed(fixtures.run([r for record in measured for r in (record, predicted(record))]))
        (row,) = [line for line in text.splitlines() if line.startswith("zero3-bf16-full ")]
        assert row.split() == ["zero3-bf16-full", "7.35", "7.35", "exact", "9.62", "9.63", "+0.10", "519.3", "3.724"]
        assert "Between steps every prediction is exact to the byte; peaks are within 0.10 %." in text

    def test_a_narrow_terminal_loses_predictions_and_keeps_their_errors(self) -> None:
        measured = [fixtures.measure(case) for case in fixtures.cases()]
        text = printed(fixtures.run([r for record in measured for r in (record, predicted(record))]), 50)
        (row,) = [line for line in text.splitlines() if line.startswith("zero3-bf16-full ")]
        assert row.split() == ["zero3-bf16-full", "7.35", "exact", "9.62", "+0.10"]

    def test_what_failed_is_said_first(self) -> None:
        lines = printed(fixtures.failed_run()).splitlines()
        assert lines[0].endswith("1 of 6 cases finished: 1 oom, 1 failed, 3 planned.")

    def test_the_dry_run_stands_for_the_prediction_where_the_closed_form_knows_no_peak(self) -> None:
        case = fixtures.case()
        blind = dataclasses.replace(fixtures.estimate(case), peak_allocated_bytes=None, peak_phase=None, phases={})
        text = printed(fixtures.run([blind, fixtures.simulate(case), fixtures.measure(case)]))
        assert "predicted by the dry run" in text
        assert "?" not in text.splitlines()[-2]
