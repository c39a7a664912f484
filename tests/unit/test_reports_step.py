"""The inside of a step in the HTML report: what is drawn, what is thinned, and what is alive at the
peak."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import report_fixtures as fixtures

from bf16prof.records import Case, MemoryRecord, PhaseStart, Timeline
from bf16prof.reports import html, step_panels
from bf16prof.reports.step_figure import STACK, step_figure
from bf16prof.reports.step_panels import Panel, panels, with_thin_timelines
from bf16prof.reports.views import run_views
from bf16prof.runs import Run
from bf16prof.verdict import allocator_limit
from bf16prof.vocabulary import Component, Device, Phase, Source

GIB = 2**30


def drawn(record: MemoryRecord, timeline: Timeline | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The traces and the layout of a record's figure."""
    line = timeline or record.timeline
    assert line is not None
    figure = step_figure("f", record, line)
    assert figure is not None
    spec = json.loads(figure.spec)
    return spec["data"], spec["layout"]


def texts(layout: dict[str, Any]) -> list[str]:
    return [annotation["text"] for annotation in layout["annotations"]]


def heights(layout: dict[str, Any]) -> list[float]:
    """Where horizontal lines are."""
    return [shape["y0"] for shape in layout["shapes"] if shape.get("xref") == "paper" and shape["line"]["width"] < 3]


def made(records: list[MemoryRecord]) -> list[Panel]:
    return panels(run_views([fixtures.run(records)]))[0]


def worlds(count: int) -> list[MemoryRecord]:
    return [fixtures.simulate(fixtures.case(world=2 * index + 2)) for index in range(count)]


class TestFigure:
    def test_the_areas_add_up_to_the_outline(self) -> None:
        traces, _ = drawn(fixtures.simulate(fixtures.case()))
        *areas, outline, _ = traces
        assert [area["name"] for area in areas] == [str(c).replace("_", " ") for c in STACK if any(area_of(c))]
        for total, *parts in zip(outline["y"], *(area["y"] for area in areas), strict=True):
            assert sum(parts) == pytest.approx(total, abs=0.001 * len(parts))

    def test_whoever_points_at_an_event_sees_what_it_allocated_and_where(self) -> None:
        record = fixtures.simulate(fixtures.case())
        *_, outline, _ = drawn(record)[0]
        assert outline["text"][1] == "<br>+8.00 MiB activations: mul (forward), layers.1"
        assert "&lt;b&gt;layers.0" in outline["text"][0], "names are text"
        assert len(outline["text"]) == len(outline["y"])

    def test_the_peak_is_marked_where_it_is(self) -> None:
        record = fixtures.simulate(fixtures.case())
        traces, layout = drawn(record)
        assert traces[-1]["x"] == [402]
        assert traces[-1]["y"] == [max(traces[-2]["y"])] == [round((record.peak_allocated_bytes or 0) / GIB, 3)]
        assert f"peak {(record.peak_allocated_bytes or 0) / GIB:.2f} GiB" in texts(layout)

    def test_phases_are_named_over_their_bands(self) -> None:
        _, layout = drawn(fixtures.simulate(fixtures.case()))
        assert texts(layout)[:3] == ["forward", "backward", "step"]
        dotted = [shape["x0"] for shape in layout["shapes"] if shape["line"].get("dash") == "dot"]
        assert dotted == [4, 400, 1200]
        grey = [(shape["x0"], shape["x1"]) for shape in layout["shapes"] if shape["type"] == "rect"]
        assert grey == [(4, 400), (1200, 1598)]
        assert layout["xaxis"]["range"] == [0, 1598]

    def test_of_short_phases_a_letter_is_left_and_of_tiny_ones_nothing(self) -> None:
        record = fixtures.simulate(fixtures.case())
        assert record.timeline is not None
        starts = [(Phase.FORWARD, 0), (Phase.BACKWARD, 80), (Phase.FORWARD, 1590), (Phase.STEP, 1590), (Phase.STEP, 1700)]
        crowded = dataclasses.replace(record.timeline, phases=tuple(PhaseStart(*start) for start in starts))
        assert texts(drawn(record, crowded)[1])[:3] == ["F", "backward", f"peak {(record.peak_allocated_bytes or 0) / GIB:.2f} GiB"]

    def test_what_bounds_it_is_drawn_where_it_is_near(self) -> None:
        record = fixtures.simulate(fixtures.case())
        peak = record.peak_allocated_bytes or 0
        assert allocator_limit(record) is not None
        assert heights(drawn(record)[1]) == [round((record.reserved_bytes or 0) / GIB, 3)], "80 GB are far above"
        cramped = fixtures.shortage(fixtures.case())
        assert heights(drawn(cramped)[1])[1:] == [16.0]
        assert "the allocator's limit 16.00 GiB" in texts(drawn(cramped)[1])
        assert heights(drawn(dataclasses.replace(record, reserved_bytes=2 * peak + 1))[1]) == []
        assert heights(drawn(dataclasses.replace(record, reserved_bytes=None, device=Device.CPU, gpu=None))[1]) == []

    def test_everything_that_is_drawn_lies_within_the_axes(self) -> None:
        for record in (fixtures.simulate(fixtures.case()), fixtures.shortage(fixtures.case())):
            traces, layout = drawn(record)
            low, high = layout["yaxis"]["range"]
            assert low == 0
            assert max(*traces[-2]["y"], *heights(layout)) < high

    def test_there_is_no_figure_of_nothing(self) -> None:
        record = fixtures.bare_record()
        assert step_figure("f", record, Timeline((), (), {})) is None
        assert step_figure("f", record, Timeline((0, 1), (), {Component.BUFFERS: (0, 0)})) is None

    def test_odd_timelines_are_drawn_all_the_same(self) -> None:
        record = fixtures.simulate(fixtures.case())
        drawn(record, Timeline((0,), (PhaseStart(Phase.STEP, 9),), {Component.OTHER: (5,), Component.PARAMETERS: (2**62,)}))
        drawn(record, Timeline((0, 1, 2), (), {Component.OTHER: (5, 0, 7)}))


def area_of(component: Component) -> tuple[int, ...]:
    line = fixtures.timeline(fixtures.case())
    return line.components.get(component, ())


class TestThinning:
    @pytest.mark.parametrize("points", [1, 7, 100, 799])
    def test_the_highest_of_neighbours_stays(self, points: int) -> None:
        whole = fixtures.timeline(fixtures.case())
        thin = whole.thinned(points)
        totals = [sum(values) for values in zip(*whole.components.values(), strict=True)]
        thin_totals = [sum(values) for values in zip(*thin.components.values(), strict=True)]
        assert len(thin.events) == len(thin_totals) == points
        assert max(thin_totals) == max(totals)
        assert list(thin.events) == sorted(set(thin.events))
        assert thin.phases == whole.phases
        assert all(totals[whole.events.index(event)] == total for event, total in zip(thin.events, thin_totals, strict=True))

    def test_what_is_short_is_left_alone(self) -> None:
        whole = fixtures.timeline(fixtures.case())
        assert whole.thinned(800) is whole

    def test_a_page_of_many_cases_keeps_fewer_points_and_their_peaks(self) -> None:
        few, many = fixtures.run(worlds(step_panels.MANY)), fixtures.run(worlds(step_panels.MANY + 1))
        assert with_thin_timelines([few]) == [few]
        [thin] = with_thin_timelines([many])
        for before, after in zip(many.records, thin.records, strict=True):
            assert after.timeline is not None
            assert len(after.timeline.events) == step_panels.FEW_POINTS
            assert max(map(sum, zip(*after.timeline.components.values(), strict=True))) == before.peak_allocated_bytes

    def test_the_records_in_the_page_hold_what_is_drawn(self) -> None:
        page = html.render([fixtures.run(worlds(step_panels.MANY + 1))])
        data = json.loads(page.partition('id="records">')[2].partition("</script>")[0])
        assert {len(record["timeline"]["events"]) for record in data["records"]} == {step_panels.FEW_POINTS}
        whole = html.render([fixtures.run(worlds(1))])
        data = json.loads(whole.partition('id="records">')[2].partition("</script>")[0])
        assert len(data["records"][0]["timeline"]["events"]) == 800


class TestPanels:
    def test_one_per_record_that_knows_the_inside_of_a_step(self) -> None:
        found = made(list(fixtures.simulated_run().records))
        assert [panel.label for panel in found] == [case.label for case in fixtures.cases()]
        assert len({panel.id for panel in found}) == 6
        assert [panel.verdict.fits for panel in found if panel.verdict] == [True, False, False, True, True, True]
        assert [list(panel.figures) for panel in made(list(fixtures.run().records))] == [["errors"]], "the one that was missed"

    def test_two_sources_of_a_case_are_told_apart(self) -> None:
        record = fixtures.simulate(fixtures.case())
        assert [p.label for p in made([record, dataclasses.replace(record, source=Source.MEASURE)])] == [
            "zero3-w2-bf16-fp32-master, measure", "zero3-w2-bf16-fp32-master, simulate",
        ]  # fmt: skip

    def test_too_many_are_counted(self) -> None:
        records = [fixtures.simulate(Case("p", 3, world + 1, "bf16-full"), 9) for world in range(step_panels.MOST_PANELS + 3)]
        found, left_out = panels(run_views([fixtures.run(records)]))
        assert (len(found), left_out) == (step_panels.MOST_PANELS, 3)
        assert "3 more cases know the inside of a step" in html.render([fixtures.run(records)])

    def test_components_at_the_peak_stand_beside_those_between_steps(self) -> None:
        record = fixtures.simulate(fixtures.case())
        components, items = made([record])[0].tables
        assert components.headers == ("component", "between steps", "at the peak", "share")
        *rows, total = components.rows
        assert sum(row[2].value or 0 for row in rows) == total[2].value == record.peak_allocated_bytes
        assert sum(row[1].value or 0 for row in rows) == total[1].value == record.allocated_bytes
        assert sum(row[3].value or 0 for row in rows) == pytest.approx(1)
        assert "(backward)" in components.caption
        assert "(backward)" in items.caption

    def test_the_largest_tensors_and_the_rest_add_up(self) -> None:
        record = fixtures.simulate(fixtures.case())
        items = made([record])[0].tables[1]
        assert len(items.rows) == 13
        assert sum(row[2].value or 0 for row in items.rows) == sum(item.bytes for item in record.peak_items)
        assert items.rows[-1][0].text == f"{len(record.peak_items) - 12} smaller ones"
        sizes = [row[2].value or 0 for row in items.rows[:-1]]
        assert sizes == sorted(sizes, reverse=True)

    def test_a_single_smaller_one_is_named_too(self) -> None:
        record = fixtures.simulate(fixtures.case())
        items = made([dataclasses.replace(record, peak_items=record.peak_items[:13])])[0].tables[1]
        assert len(items.rows) == 13
        assert not any("smaller ones" in row[0].text for row in items.rows)

    def test_without_a_timeline_the_tables_stay(self) -> None:
        [panel] = made([dataclasses.replace(fixtures.simulate(fixtures.case()), timeline=None)])
        assert "step" not in panel.figures
        assert len(panel.tables) == 2
        assert 'id="step-0"' in html.render([fixtures.run([dataclasses.replace(fixtures.simulate(fixtures.case()), timeline=None)])])

    def test_a_peak_in_an_earlier_step_is_said(self) -> None:
        record = fixtures.simulate(fixtures.case())
        later = dataclasses.replace(record, peak_allocated_bytes=40 * GIB, peak_components={})
        assert any("the training peak, 40.00 GiB, lies in an earlier step" in note for note in made([later])[0].notes)
        assert not any("earlier" in note for note in made([record])[0].notes)

    def test_what_the_device_adds_is_named(self) -> None:
        assert any("CUDA context" in note for note in made([fixtures.simulate(fixtures.case())])[0].notes)


def test_the_page_shows_the_first_case_and_a_button_for_each() -> None:
    page = html.render([fixtures.simulated_run()])
    assert page.count('data-panel="step-') == 6
    assert page.count('<article class="panel"') == 6
    assert len(re.findall('<article class="panel" id="[^"]*" hidden>', page)) == 5
    assert "data-panel" not in html.render([only()])


def only() -> Run:
    return fixtures.run([fixtures.simulate(fixtures.case())])


@pytest.mark.parametrize("text", fixtures.HOSTILE)
def test_names_do_not_reach_the_figure(text: str) -> None:
    hostile, plain = (fixtures.hostile_simulation(Case(name, 3, 2, name), name) for name in (text, "plain"))
    assert drawn(hostile) == drawn(plain)
