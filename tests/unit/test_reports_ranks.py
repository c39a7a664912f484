"""The ranks of a case side by side: in a table, in words and in figures."""

from __future__ import annotations

import dataclasses
import io

import pytest
import report_fixtures as fixtures
from rich.console import Console

from bf16prof.records import MemoryRecord
from bf16prof.reports import html
from bf16prof.reports.console import breakdown, run_summary
from bf16prof.reports.ranks import MOST_RANKS, imbalance, ranks_table
from bf16prof.reports.ranks_figure import rank_peaks, rank_times
from bf16prof.reports.views import run_views


@pytest.fixture(scope="module")
def record() -> MemoryRecord:
    return fixtures.measure(fixtures.case())


def printed(record: MemoryRecord) -> tuple[str, str]:
    """The summary of its run, and its breakdown."""
    consoles = [Console(file=io.StringIO(), width=300, highlight=False) for _ in range(2)]
    run_summary(fixtures.run([record]), consoles[0])
    breakdown(record, consoles[1])
    first, second = (console.file for console in consoles)
    assert isinstance(first, io.StringIO)
    assert isinstance(second, io.StringIO)
    return first.getvalue(), second.getvalue()


def test_the_worst_rank_and_the_straggler_are_named_with_their_hosts(record: MemoryRecord) -> None:
    peak, forward = imbalance(record)

    assert peak.startswith("training peak: rank 0 (hosta, cuda:0) has the highest, ")
    assert peak.endswith("671 B more than the lowest")
    assert forward == "forward: rank 1 (<b>host</b>, cuda:1) is slowest, 300.0 ms, +20.00 % over the median of the ranks"


def test_ranks_that_are_alike_are_said_to_be() -> None:
    record = fixtures.measure(fixtures.case())
    same = dataclasses.replace(record, ranks=tuple(dataclasses.replace(record.ranks[0], rank=n, phase_time_s={}) for n in range(3)))

    assert imbalance(same) == ["training peak: the same on all 3 ranks"]
    assert imbalance(dataclasses.replace(record, ranks=record.ranks[:1])) == []


def test_of_many_ranks_those_with_the_highest_peaks_are_shown(record: MemoryRecord) -> None:
    many = tuple(dataclasses.replace(record.ranks[0], rank=n, peak_allocated_bytes=n) for n in range(1000))
    table = ranks_table(dataclasses.replace(record, ranks=many))

    assert table is not None
    assert [row[0].text for row in table.rows] == [str(n) for n in range(1000 - MOST_RANKS, 1000)]
    assert "of 1000" in table.caption


def test_the_terminal_shows_imbalance_between_hosts_and_all_ranks_in_the_breakdown(record: MemoryRecord) -> None:
    summary, whole = printed(record)

    assert all(text in summary for text in imbalance(record))
    assert "<b>host</b>" in whole
    assert "whole-run peak" in whole
    one_host = dataclasses.replace(record, ranks=tuple(dataclasses.replace(rank, node=0) for rank in record.ranks))
    assert "slowest" not in printed(one_host)[0]


def test_the_page_has_a_table_and_figures_of_ranks(record: MemoryRecord) -> None:
    page = html.render([fixtures.run([record])])
    views = run_views([fixtures.run([record])])

    assert 'href="#ranks"' in page
    assert "&lt;b&gt;host&lt;/b&gt;" in page
    for figure in (rank_peaks(views), rank_times(views)):
        assert figure is not None
        assert figure.series == (0,)
        assert "<b>host" not in figure.spec


def test_the_peaks_of_ranks_stand_below_the_line_of_their_gpu(record: MemoryRecord) -> None:
    limited = dataclasses.replace(record, limit_bytes=70 * 2**30)
    drawn = rank_peaks(run_views([fixtures.run([limited])]))
    without = rank_peaks(run_views([fixtures.run([record])]))

    assert drawn is not None
    assert without is not None
    assert {shape["y0"] for shape in drawn.layout["shapes"]} == {70.0}
    assert [text["text"] for text in drawn.layout["annotations"]] == ["limit 70.00 GiB"]
    assert "shapes" not in without.layout


def test_one_rank_has_no_figure(record: MemoryRecord) -> None:
    views = run_views([fixtures.run([dataclasses.replace(record, ranks=record.ranks[:1])])])

    assert (rank_peaks(views), rank_times(views), ranks_table(views[0].main)) == (None, None, None)
