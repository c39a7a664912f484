"""Long runs: running means in linear time, exactly; figures and the page with as many points as can
be told apart."""

from __future__ import annotations

import math
import statistics

import report_fixtures as fixtures
from hypothesis import given, settings
from hypothesis import strategies as st

from bf16prof import runs
from bf16prof.records import MemoryRecord
from bf16prof.reports.html import render
from bf16prof.reports.losses import running_mean
from bf16prof.reports.thinning import MOST_POINTS, as_kept, thinned
from bf16prof.step_records import StepRecord

LOSSES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=60)


@settings(deadline=None)
@given(LOSSES, st.integers(1, 12))
def test_a_running_mean_is_the_mean_of_each_window(values: list[float | None], window: int) -> None:
    found = running_mean(list(enumerate(values)), window)

    assert [step for step, _ in found] == list(range(window - 1, len(values)))
    for step, mean in found:
        of_window = values[step - window + 1 : step + 1]
        known = [value for value in of_window if value is not None]
        if len(known) < window:
            assert mean is None
        else:
            assert mean is not None
            assert math.isclose(mean, statistics.fmean(known), rel_tol=1e-12, abs_tol=1e-15)


def test_one_huge_loss_leaves_no_trace_in_later_windows() -> None:
    assert running_mean(list(enumerate([1.5, 1.7e308, 0.25, 0.75])), 2)[-1] == (3, 0.5)


def test_a_thin_curve_keeps_its_ends_its_spikes_and_its_gaps() -> None:
    curve = [(n, 2.0 + math.sin(n)) for n in range(50_000)]
    spikes: list[tuple[int, float | None]] = [*curve[:777], (777, 99.0), *curve[778:31_111], (31_111, -5.0), *curve[31_112:]]
    spikes[40_000] = (40_000, None)

    found = thinned(spikes, lambda point: point[1])

    assert len(found) <= MOST_POINTS + 2
    assert found == sorted(found, key=lambda point: point[0])
    assert {spikes[0], spikes[-1], (777, 99.0), (31_111, -5.0), (40_000, None)} <= set(found)


def test_a_short_curve_is_drawn_as_it_is() -> None:
    assert thinned([1, 2, 3], float) == [1, 2, 3]


def long_run(steps: int) -> tuple[runs.Run, MemoryRecord]:
    whole = fixtures.run()
    record = next(r for r in whole.records if r.steps)
    import dataclasses

    many = dataclasses.replace(record, steps=tuple(StepRecord(n, 1.0 + n % 7, 0.5, None) for n in range(steps)))
    return dataclasses.replace(whole, records=(many,)), many


def test_the_page_of_a_long_run_is_bounded_and_says_so() -> None:
    (short, _), (long, record) = long_run(1000), long_run(60_000)

    page = render([long])

    assert len(page) < len(render([short])) + 2_000_000
    assert "Of runs with more than 2,000 steps (up to 60,000 here)" in page
    assert len(as_kept(record).steps) <= MOST_POINTS
    assert "records.json has all" in as_kept(record).notes[-1]
