"""The HTML report as text, and the views behind it. What only a browser can say is in
tests/browser."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import report_fixtures as fixtures

from bf16prof.reports import figures, html
from bf16prof.reports.loss_figure import loss_curves
from bf16prof.reports.step_panels import panels
from bf16prof.reports.views import headline, run_views
from bf16prof.runs import Run
from bf16prof.vocabulary import Device, Source


class Page(HTMLParser):
    """The text, the tags and the scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.records = ""
        self._is_records = False
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
            self._is_records = dict(attrs).get("id") == "records"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
            self.records += data if self._is_records else ""
        elif self._inside != "style":
            self.text += data


def runs() -> dict[str, list[Run]]:
    return {
        "usual": [fixtures.run()],
        "failed": [fixtures.failed_run()],
        "hostile": [fixtures.hostile_run()],
        "extreme": [fixtures.extreme_run()],
        "estimate only": [fixtures.run([fixtures.estimate(fixtures.case())])],
        "bare": [fixtures.run([fixtures.bare_record()])],
        "no records": [fixtures.run([])],
        "simulated": [fixtures.simulated_run()],
        "two": [fixtures.run(), fixtures.failed_run()],
        "none": [],
    }


@pytest.mark.parametrize("name", list(runs()))
def test_every_kind_of_run_renders_the_same_bytes_twice(name: str) -> None:
    first, second = html.render(runs()[name]), html.render(runs()[name])
    assert first == second
    assert first.encode("utf-8")
    page = Page(first)
    assert [tag for tag, _ in page.tags].count("body") == 1
    json.loads(page.records, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_page_loads_nothing() -> None:
    page = Page(html.render(runs()["usual"]))
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "content" in attrs)
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:,")), tag  # type: ignore[union-attr]
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


def test_names_cannot_leave_their_place() -> None:
    harmless = fixtures.hostile_run(tuple(f"name {i}" for i in range(len(fixtures.HOSTILE))))
    usual, hostile = Page(html.render([harmless])), Page(html.render(runs()["hostile"]))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in usual.tags]
    assert len(hostile.scripts) == len(usual.scripts)
    assert "<script>alert(1)</script>" in hostile.text
    assert "\\x1b[31mred" in hostile.text
    assert not set("\x1b\x07\u202e\u2066\u200b") & set(hostile.text)
    assert not any(name.startswith("on") for _, attributes in hostile.tags for name in attributes)


def test_figures_escape_for_plotly() -> None:
    views = run_views([fixtures.hostile_run()])
    drawn = figures.all_figures(views)
    assert [name for name, figure in drawn.items() if figure is None] == ["differences", "gap"], (
        "no recipe with an fp32 master copy to compare with"
    )
    inside = [figure for panel in panels(views)[0] for figure in panel.figures.values()]
    for figure in filter(None, [*drawn.values(), *inside]):
        assert "<" not in figure.spec, "a name cannot end the script that it stands in"
        plotly = json.dumps(figure.traces) + json.dumps(figure.layout)
        assert "<script>alert" not in plotly
        assert "<a href" not in plotly
        assert not re.search(r'"hovertemplate": "[^"]*(alert|javascript)', plotly)


def test_failures_show_the_log_and_the_prediction() -> None:
    text = Page(html.render(runs()["failed"])).text
    assert "torch.OutOfMemoryError: tried to allocate 2.91 GiB" in text
    assert "predicted by estimate: 10.25 GiB allocated" in text
    assert "1 oom, 1 failed, 3 planned" in text


def test_the_headline_says_whether_the_prediction_is_exact() -> None:
    records = [record for case in fixtures.cases() for record in (fixtures.estimate(case), fixtures.measure(case))]
    assert "to the byte, 6 of 6 predictions" in html.render([fixtures.run(records)])
    assert "5 of 6 exact" in html.render([fixtures.run()])
    assert "not measured" in html.render([fixtures.run([fixtures.estimate(fixtures.case())])])
    assert "-100.00 %" in html.render([fixtures.extreme_run()])
    assert "4 of 6 cases" in html.render([fixtures.simulated_run()])


def test_losses_that_are_not_numbers_leave_a_gap() -> None:
    figure = loss_curves(run_views([fixtures.extreme_run()]))
    assert figure is not None
    assert figure.traces[0]["x"] == list(range(8))
    assert figure.traces[0]["y"] == [None, 1e30, 1e-30, -5.0, 0.0, None, None, 3.2]
    assert figure.series == (0,)


class TestViews:
    def test_runs_complete_each_other(self) -> None:
        case = fixtures.case()
        [view] = run_views([fixtures.run([fixtures.estimate(case)]), fixtures.run([fixtures.measure(case)])])
        assert list(view.records) == [Source.MEASURE, Source.ESTIMATE]
        assert headline([view]).exact == 1

    def test_two_measurements_of_a_case_stay_apart(self) -> None:
        records = [fixtures.estimate(fixtures.case()), fixtures.measure(fixtures.case())]
        views = run_views([fixtures.run(records), fixtures.run(records)])
        assert [view.label for view in views] == [f"zero3-w2-bf16-fp32-master [sweep-2026-03-01 #{i}]" for i in (1, 2)]
        assert all(len(view.records) == 2 for view in views)

    def test_labels_say_what_differs(self) -> None:
        gpu = fixtures.estimate(fixtures.case())
        other = fixtures.estimate(fixtures.case(profile="llama"))
        cpu = dataclasses.replace(gpu, device=Device.CPU)
        labels = [view.label for view in run_views([fixtures.run([gpu, other, cpu])])]
        assert labels == [
            "gpt2-1.5b: zero3-w2-bf16-fp32-master (gpu)",
            "llama: zero3-w2-bf16-fp32-master (gpu)",
            "gpt2-1.5b: zero3-w2-bf16-fp32-master (cpu)",
        ]

    def test_the_largest_error_is_found_with_its_sign(self) -> None:
        records = [fixtures.estimate(fixtures.case(1), -70_000_000), fixtures.measure(fixtures.case(1))]
        records += [fixtures.estimate(fixtures.case(2), 1000), fixtures.measure(fixtures.case(2))]
        worst = headline(run_views([fixtures.run(records)])).worst
        assert worst is not None
        assert worst[0].case.zero_stage == 1
        assert worst[1].differences == {Source.ESTIMATE: -70_000_000}


def test_reports_import_without_the_heavy_packages() -> None:
    code = (
        "import sys, bf16prof.reports.html, bf16prof.reports.console, bf16prof.reports.tables; "
        "sys.exit(','.join({'torch', 'deepspeed', 'pandas', 'plotly', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr.strip() == ""
