"""The figures of the page as data: what they draw, in which colours, against which limit."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import report_fixtures as fixtures

from bf16prof.records import Item, LayerBytes, MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.anchors import RESERVED, anchors
from bf16prof.reports.answers import answers
from bf16prof.reports.chosen import headline_case, nearest_the_limit
from bf16prof.reports.fit_map import fit_maps
from bf16prof.reports.memory_figure import MOST_CASES, memory
from bf16prof.reports.plots import Figure, bundle
from bf16prof.reports.treemap import layer_map, treemap
from bf16prof.reports.views import CaseView, run_views
from bf16prof.reports.waterfall import waterfall
from bf16prof.runs import CaseStatus, Status
from bf16prof.vocabulary import Component, Phase

GIB = 2**30
LIMIT = 70 * GIB


def sized(gibs: float, stage: int = 3, world: int = 2, recipe: str = "bf16-full") -> MemoryRecord:
    """An estimate of a job on an H100 with so much at its peak, half of it parameters, and half of
    that between steps."""
    size = int(gibs * GIB)
    parts = {Component.PARAMETERS: size // 2, Component.ACTIVATIONS: size - size // 2}
    steady = {Component.PARAMETERS: size // 2}
    return dataclasses.replace(
        fixtures.bare_record(fixtures.case(stage, recipe, world)), gpu="h100-80gb", allocated_bytes=size // 2, components=steady,
        peak_allocated_bytes=size, run_peak_allocated_bytes=size, peak_phase=Phase.BACKWARD, peak_components=parts, reserved_bytes=size,
        limit_bytes=LIMIT, margin=0.0,
    )  # fmt: skip


def grid() -> list[CaseView]:
    """Twenty cases of two recipes from 4 to 160 GiB."""
    sizes = {(stage, world): 160 / world / stage + 2 for stage in (1, 2) for world in (1, 2, 4, 8, 16)}
    records = [sized(size, stage, world, recipe) for recipe in fixtures.RECIPES for (stage, world), size in sizes.items()]
    return run_views([fixtures.run(records)])


def bars(figure: Figure) -> list[tuple[str, float, float]]:
    """(component, y, length) of every bar."""
    return [(t["name"], y, x) for t in figure.traces if t["type"] == "bar" for y, x in zip(t["y"], t["x"], strict=True)]


class TestPalette:
    def test_no_colour_means_two_things(self) -> None:
        kinds = [set(palette.COMPONENTS.values()), {c for c, *_ in palette.PHASES.values()}, set(palette.RECIPES), {palette.LIMIT}]
        for one, other in itertools.combinations(kinds, 2):
            assert min(apart(a, b) for a in one for b in other) > 20

    def test_lines_stand_out_on_white_and_on_the_dark_page(self) -> None:
        for colour in (*palette.RECIPES, *(colour for colour, *_ in palette.PHASES.values())):
            assert contrast(colour, "#ffffff") >= 3
            assert contrast(colour, "#171b20") >= 3

    @pytest.mark.parametrize("colour", palette.COMPONENTS.values())
    def test_a_name_reads_on_its_component(self, colour: str) -> None:
        assert contrast(palette.on(colour), colour) >= 4.5


def channels(colour: str) -> tuple[float, float, float]:
    """Linear red, green and blue."""
    wide = "".join(c * 2 for c in colour[1:]) if len(colour) == 4 else colour[1:]
    red, green, blue = (int(wide[i : i + 2], 16) / 255 for i in (0, 2, 4))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return linear[0], linear[1], linear[2]


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels(colour), strict=True))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def lab(colour: str) -> tuple[float, float, float]:
    """CIELAB under D65."""
    r, g, b = channels(colour)
    xyz = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505, luminance(colour), (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def apart(one: str, other: str) -> float:
    """The distance of two colours (CIE 1976)."""
    return math.dist(lab(one), lab(other))


class TestMemory:
    def test_a_bar_ends_at_the_peak_and_the_thin_one_at_the_steady_state(self) -> None:
        figure = memory(run_views([fixtures.run([sized(40)])]))
        assert figure is not None
        by_row: dict[float, float] = {}
        for _, y, length in bars(figure):
            by_row[y] = by_row.get(y, 0) + length
        assert sorted(by_row.values()) == [pytest.approx(20), pytest.approx(40)]

    def test_the_limit_is_a_line_and_a_word(self) -> None:
        figure = memory(run_views([fixtures.run([sized(40)])]))
        assert figure is not None
        lines = {shape["x0"] for shape in figure.layout["shapes"]}
        assert lines == {LIMIT / GIB}
        assert figure.layout["xaxis"]["range"][1] > LIMIT / GIB
        assert "limit 70.00 GiB" in [annotation["text"] for annotation in figure.layout["annotations"]]

    def test_a_limit_out_of_reach_is_named_at_the_edge(self) -> None:
        figure = memory(run_views([fixtures.run([sized(2)])]))
        assert figure is not None
        assert figure.layout["shapes"] == []
        assert "limit 70.00 GiB →" in [annotation["text"] for annotation in figure.layout["annotations"]]
        assert figure.layout["xaxis"]["range"][1] < 3

    def test_of_many_cases_those_that_just_fit_are_drawn(self) -> None:
        views = grid()
        shown = nearest_the_limit(views, 4)
        peaks = sorted(view.main.peak_allocated_bytes or 0 for view in views)
        fitting = [size for size in peaks if size <= LIMIT]
        assert sorted(view.main.peak_allocated_bytes or 0 for view in shown) == fitting[-4:]
        assert headline_case(views) in shown
        figure = memory(views)
        assert figure is not None
        assert len({y for _, y, _ in bars(figure)}) == 2 * MOST_CASES
        assert f"{MOST_CASES} of 20 cases" in figure.words

    def test_a_peak_of_init_above_training_is_marked(self) -> None:
        record = dataclasses.replace(sized(40), run_peak_allocated_bytes=50 * GIB)
        figure = memory(run_views([fixtures.run([record])]))
        assert figure is not None
        (mark,) = [trace for trace in figure.traces if trace.get("name") == "peak of init"]
        assert mark["x"] == [50]

    def test_nothing_known_draws_nothing(self) -> None:
        assert memory(run_views([fixtures.run([fixtures.bare_record()])])) is None


class TestMap:
    def test_each_cell_says_by_symbol_and_number_what_is_left(self) -> None:
        views = grid()
        maps = fit_maps(views)
        assert [one.title for one in maps] == list(fixtures.RECIPES)
        assert maps[0].columns == ("1", "2", "4", "8", "16")
        (stage, cells), *_ = maps[0].rows
        assert stage == "1"
        assert [(cell.symbol, cell.text) for cell in cells if cell] == [
            ("✗", "-92.0"), ("✗", "-12.0"), ("✓", "+28.0"), ("✓", "+48.0"), ("✓", "+58.0"),
        ]  # fmt: skip
        assert cells[2] is not None
        assert cells[2].anchor == "zero1-w4-bf16-fp32-master"

    def test_few_cases_and_cases_without_a_gpu_have_no_map(self) -> None:
        assert fit_maps(grid()[:4]) == []
        assert fit_maps(run_views([fixtures.run()])) == []


class TestTreemap:
    def test_areas_are_shares_of_the_bytes(self) -> None:
        record = fixtures.simulate(fixtures.case())
        figure = treemap("figure-map", record)
        assert figure is not None
        areas = {t["text"].split("<br>")[1]: area(t) for t in figure.traces}
        items = {item.name: item.bytes for item in record.peak_items}
        total = sum(items.values())
        for name, size in items.items():
            if size > total / 50:
                assert areas[name] / sum(areas.values()) == pytest.approx(size / total, rel=0.1), name

    def test_small_tensors_are_drawn_as_one(self) -> None:
        many = tuple(Item(Component.ACTIVATIONS, f"tensor {i}", 100) for i in range(5000))
        record = dataclasses.replace(fixtures.bare_record(), peak_items=(Item(Component.PARAMETERS, "all", 500_000), *many))
        figure = treemap("figure-map", record)
        assert figure is not None
        assert [t["text"].split("<br>")[1] for t in figure.traces] == ["all", "5000 smaller ones"]

    def test_without_names_there_is_none(self) -> None:
        assert treemap("figure-map", fixtures.bare_record()) is None
        assert layer_map("figure-layers", fixtures.simulate(fixtures.case())) is None

    def test_by_layer_the_areas_add_up_to_the_peak(self) -> None:
        parts = {Component.PARAMETERS: 60, Component.ACTIVATIONS: 40}
        layers = tuple(LayerBytes(f"layers.{i}", Component.ACTIVATIONS, 10) for i in range(3))
        record = dataclasses.replace(
            fixtures.bare_record(),
            peak_allocated_bytes=100,
            peak_components=parts,
            peak_layers=(*layers, LayerBytes("head", Component.PARAMETERS, 5)),
        )
        figure = layer_map("figure-layers", record)
        assert figure is not None
        shares = {tuple(t["text"].split("<br>")[:2]): t["text"].split(", ")[-1].replace(".0", "") for t in figure.traces}
        assert shares == {
            ("of no single layer", "parameters"): "55 %", ("of no single layer", "activations"): "10 %", ("head", "parameters"): "5 %",
            **{(f"layers.{i}", "activations"): "10 %" for i in range(3)},
        }  # fmt: skip


def area(trace: dict[str, list[float]]) -> float:
    return (max(trace["x"]) - min(trace["x"])) * (max(trace["y"]) - min(trace["y"]))


class TestWaterfall:
    def test_each_component_begins_where_the_one_before_ended(self) -> None:
        predicted = dataclasses.replace(
            sized(10), components={Component.PARAMETERS: 3 * GIB, Component.BUFFERS: 2 * GIB}, allocated_bytes=5 * GIB
        )
        measured = dataclasses.replace(
            predicted, components={Component.PARAMETERS: 4 * GIB, Component.BUFFERS: GIB, Component.OTHER: 3 * GIB}, allocated_bytes=8 * GIB
        )
        figure = waterfall("figure-errors", predicted, measured)
        assert figure is not None
        steps, total = figure.traces
        assert list(zip(steps["y"], steps["base"], steps["x"], strict=True)) == [
            ("parameters", 0, 1), ("buffers", 1, -1), ("other", 0, 3),
        ]  # fmt: skip
        assert (total["y"], total["x"]) == (["all together"], [3])

    def test_what_is_exact_needs_none(self) -> None:
        assert waterfall("figure-errors", sized(10), sized(10)) is None


class TestAnswers:
    def test_the_first_screen_answers_in_the_order_of_the_questions(self) -> None:
        found = answers([fixtures.run([sized(40)])], run_views([fixtures.run([sized(40)])]))
        assert [answer.id for answer in found] == ["fits", "bytes", "errors", "speed", "learns"]
        fits, where, errors, speed, learns = found
        assert fits.text == "✓ fits, 30.00 GiB free"
        (bar,) = fits.bars
        assert bar.limit is not None
        assert sum(part.share for part in bar.segments) / bar.limit == pytest.approx(40 * GIB / LIMIT)
        assert where.text == "40.00 GiB at the peak, in backward"
        assert [(name, size) for _, name, size in where.parts] == [
            ("parameters", "20.00 GiB, 50.0 %"),
            ("activations", "20.00 GiB, 50.0 %"),
        ]
        assert (errors.text, speed.text, learns.text) == ("not measured", "not measured", "not measured")

    def test_the_error_of_the_peak_comes_before_that_of_the_steady_state(self) -> None:
        _, _, errors, speed, learns = answers([fixtures.run()], run_views([fixtures.run()]))
        assert errors.text.endswith("at the peak")
        assert "5 of 6 exact" in errors.details[1]
        assert speed.text == "399.5 ms a step"
        assert learns.text.startswith("loss 10.8 → ")

    def test_a_case_that_ran_out_of_memory_does_not_fit(self) -> None:
        run = fixtures.run([fixtures.measure(fixtures.case())], [CaseStatus(fixtures.case(), Status.OOM, "CUDA out of memory")])
        assert answers([run], run_views([run]))[0].text == "✗ 1 of 1 case ran out of memory"

    def test_without_records_nothing_is_claimed(self) -> None:
        assert [answer.text for answer in answers([], [])] == ["no GPU to fit", "not known", "not measured", "not measured", "not measured"]


class TestAnchors:
    def test_a_case_is_called_as_it_is(self) -> None:
        assert anchors(run_views([fixtures.run()]))[0] == "zero1-w2-bf16-fp32-master"

    def test_what_an_address_does_not_carry_becomes_a_dash_and_no_two_are_the_same(self) -> None:
        views = run_views([fixtures.hostile_run(), fixtures.run(), fixtures.run(name="again")])
        found = anchors(views)
        assert len(set(found)) == len(views)
        assert not [name for name in found if set(name) & set(" <>\"'&?#%") or name in RESERVED]

    def test_a_case_called_like_a_section_is_told_from_it(self) -> None:
        (view,) = run_views([fixtures.run([fixtures.bare_record()])])
        assert anchors([dataclasses.replace(view, label="summary")] * 2) == ["summary-2", "summary-3"]


def test_the_bundle_is_small_and_cannot_end_its_script() -> None:
    assert len(bundle()) < 1_600_000
    assert "</script" not in bundle()
    assert "Licensed under the MIT license" in bundle()[:200]
