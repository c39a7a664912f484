"""The published table as a run: its figures, its citation, and the prediction beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Main, main, refused
from logs import by_quantity
from published import rows

from bf16prof.imports.published import find_published, published_names

__all__ = ["main"]

PUBLISHED = "published:deepspeed-bf16-example"


def test_the_published_figures_are_those_of_the_collection() -> None:
    """The figures were copied twice, by hand: into the package, and into the tests' collection of published numbers."""
    baseline, low = find_published("deepspeed-bf16-example").records

    assert published_names() == ["deepspeed-bf16-example"]
    for metric, field in (("allocated", "allocated_bytes"), ("peak_allocated", "run_peak_allocated_bytes")):
        for row, record in zip(rows("example README", metric), (baseline, low), strict=True):
            assert getattr(record, field) == pytest.approx(row["value"] * 2**30, abs=1)
    assert [(record.step_time_s, record.loss) for record in (baseline, low)] == [(0.6016, 3.09), (0.6427, 3.12)]
    assert "mean 2.78, standard deviation 1.56" in " ".join(baseline.notes)
    assert "mean 2.9, standard deviation 2.37" in " ".join(low.notes)
    for record in (baseline, low):
        assert record.notes[0].startswith("published in deepspeedai/DeepSpeedExamples training/bf16_master_weight/README.md @")
        assert record.notes[0].endswith(": https://github.com/deepspeedai/DeepSpeedExamples/tree/master/training/bf16_master_weight")


def test_prediction_against_publication(main: Main, tmp_path: Path) -> None:
    """Both steady states and the baseline's peak are what was printed; the other peak is lower since DeepSpeed 0.19.4."""
    code, out, _ = main("report", PUBLISHED, "--json", "-o", tmp_path / "published.html")
    document = json.loads(out)

    assert code == 0
    baseline, low = by_quantity(document, "bf16-fp32-master"), by_quantity(document, "bf16-full-autocast")
    for comparison in (baseline["allocated_bytes"], baseline["run_peak_allocated_bytes"], low["allocated_bytes"]):
        assert 0 < abs(comparison["values"]["estimate"] - comparison["values"]["import"]) <= comparison["rounding"] == 5_368_708
    assert -0.0075 < low["run_peak_allocated_bytes"]["errors"]["estimate"] < -0.001
    page = (tmp_path / "published.html").read_text()
    assert "as printed" in page
    assert "published in deepspeedai/DeepSpeedExamples" in page


def test_the_published_run_has_no_folder_to_write_into(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    code, out, _ = main("report", PUBLISHED)

    assert code == 0
    assert "as printed (+3.64 MiB)" in out
    (summary,) = (line for line in out.splitlines() if line.startswith("zero3-w4-bf16-full-autocast  16.17 GiB"))
    assert "18.93 GiB" in summary, "a peak of the whole run, where there is no other"
    assert "0 of 2 predictions exact to the byte, 2 as far as was printed." in out
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "exists" in refused(main("report", PUBLISHED))


def test_an_unknown_published_run_names_those_that_there_are(main: Main) -> None:
    assert f"known: {PUBLISHED}" in refused(main("report", "published:moby-dick"))
