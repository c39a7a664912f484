"""A figure, or a trace, as a file of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fixtures
from command_line import Main, main, refused  # noqa: F401
from report_fixtures import run_folder  # noqa: F401

from bf16prof.records import LayerBytes
from bf16prof.reports import pictures
from bf16prof.reports.figure_names import FIGURES
from bf16prof.reports.figures import all_figures
from bf16prof.reports.step_panels import CAPTIONS
from bf16prof.reports.trace import is_trace, trace
from bf16prof.runs import Run
from bf16prof.vocabulary import Component, Phase

OF_SEVERAL = ("gap", "differences", "ranks", "rank_times")
"""Figures that take more than one case, or ranks."""


def whole() -> Run:
    """A case that every source knows."""
    case = fixtures.case()
    learned = dataclasses.replace(fixtures.measure(case), quality=(fixtures.watched(),))
    layers = tuple(LayerBytes(f"layers.{number}", Component.ACTIVATIONS, 1000) for number in range(2))
    simulated = dataclasses.replace(fixtures.simulate(case), peak_layers=layers)
    return fixtures.run([fixtures.estimate(case, 1200), simulated, learned])


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in OF_SEVERAL])
def test_every_figure_has_a_name_and_stands_alone_on_paper(name: str) -> None:
    drawn = pictures.on_paper(pictures.figure([whole()], name))

    assert drawn["layout"]["paper_bgcolor"] == "#fff"
    assert drawn["layout"]["title"]["text"]
    assert "<script>" not in json.dumps(drawn, allow_nan=False)
    named = {trace["name"] for trace in drawn["data"] if trace["showlegend"]}
    assert drawn["layout"]["showlegend"] is (1 < len(named) <= 16), "a legend where there is more than one thing"


def test_every_figure_of_the_page_has_its_name_here() -> None:
    assert {*all_figures([]), *CAPTIONS} == set(FIGURES)


def test_what_these_runs_do_not_know_is_refused_with_what_they_do() -> None:
    with pytest.raises(pictures.CannotDraw, match="--figure gap: nothing to draw") as caught:
        pictures.figure([whole()], "gap")
    assert "memory, step, map" in caught.value.hint


def test_without_kaleido_or_a_browser_a_hint_says_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kaleido" else find_spec(name))
    with pytest.raises(pictures.CannotDraw, match="need kaleido") as caught:
        pictures.require_drawing()
    assert "bf16prof[pictures]" in caught.value.hint

    monkeypatch.undo()
    from choreographer.browsers.chromium import Chromium

    monkeypatch.setattr(Chromium, "find_browser", classmethod(lambda _, **__: None))
    with pytest.raises(pictures.CannotDraw, match="need Chromium or Chrome") as caught:
        pictures.require_drawing()
    assert "BROWSER_PATH" in caught.value.hint


def test_a_report_writes_the_figure_that_was_named(
    main: Main,  # noqa: F811
    run_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []

    def draw(what: dict[str, Any]) -> bytes:
        asked.append((what["figure"]["layout"]["title"]["text"], what["opts"]["format"]))
        return b"drawn"

    monkeypatch.setattr(pictures, "_draw", draw)
    monkeypatch.setattr(pictures, "require_drawing", lambda: None)
    target = tmp_path / "loss.png"
    code, _, err = main("report", run_folder, "-o", target, "-o", tmp_path / "all.pdf", "--figure", "losses", "-q")

    assert (code, err) == (0, "")
    assert target.read_bytes() == b"drawn"
    assert asked == [("Loss by step", "png"), ("Loss by step", "pdf")]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('no screen')", "the browser did not draw: no screen"),
        ("import time; time.sleep(60)", "the browser did not draw within 1 seconds"),
    ],
)
def test_a_browser_that_fails_or_hangs_is_said_and_ended(program: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **settings: popen([sys.executable, "-c", program], **settings))
    monkeypatch.setattr(pictures, "LONGEST_S", 1 if "sleep" in program else 60)
    with pytest.raises(pictures.CannotDraw, match=message):
        pictures._draw({})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-o", "a.png", "--figure", "loses"), "unknown figure 'loses'"),
        (("-o", "a.html", "--figure", "losses"), "--figure losses: no file for it"),
        (
            (
                "-o",
                "a.jpg",
            ),
            "known: .json, .csv, .md, .html, .png, .svg, .pdf",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(main: Main, run_folder: Path, flags: tuple[str, ...], message: str) -> None:  # noqa: F811
    assert message in refused(main("report", run_folder, *flags))


def test_a_plan_has_no_pictures(main: Main) -> None:  # noqa: F811
    assert "known: .json, .csv, .md, .html\n" in refused(main("plan", "gpt2-xl", "-o", "a.png"))


class TestTrace:
    def test_a_file_is_a_trace_by_its_name(self) -> None:
        assert [is_trace(name) for name in ("trace.json", "a.trace.json", "records.json", "mytrace.json")] == [True, True, False, False]

    def test_counters_are_the_bytes_of_the_timeline_and_slices_its_phases(self) -> None:
        record = fixtures.simulate(fixtures.case(), 40)
        assert record.timeline is not None
        events = json.loads(trace([fixtures.run([record])]))["traceEvents"]

        totals = [event["args"]["bytes"] for event in events if event["ph"] == "C" and event["name"] == "allocated"]
        assert totals == record.timeline.totals
        parts = [event["args"] for event in events if event["name"] == "allocated by component"]
        assert [sum(sizes.values()) for sizes in parts] == totals
        slices = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"]
        assert [name for name, *_ in slices] == ["forward", "backward", "step"]
        assert [end for *_, end in slices[:-1]] == [start for _, start, _ in slices[1:]], "one begins where the other ends"

    def test_measured_steps_have_their_seconds(self) -> None:
        record = fixtures.measure(fixtures.case())
        timed = tuple(dataclasses.replace(step, phase_time_s={Phase.FORWARD: 0.1, Phase.BACKWARD: 0.2}) for step in record.steps)
        events = json.loads(trace([fixtures.run([dataclasses.replace(record, steps=timed)])]))["traceEvents"]

        steps = [event for event in events if event["ph"] == "X" and event["name"].startswith("step ")]
        assert [event["dur"] for event in steps] == pytest.approx([(step.time_s or 0) * 1e6 for step in record.steps])
        forward = [event for event in events if event["name"] == "forward"]
        assert [event["dur"] for event in forward] == pytest.approx([1e5] * len(steps))
        assert [event["ts"] for event in forward] == [event["ts"] for event in steps]

    def test_hostile_names_stay_in_their_place(self) -> None:
        events = json.loads(trace([fixtures.hostile_run()]))["traceEvents"]
        names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
        assert all(name.isprintable() for name in names)

    def test_without_timelines_and_times_it_is_empty(self) -> None:
        assert json.loads(trace([fixtures.run([fixtures.bare_record()])]))["traceEvents"] == []
