"""The published table as a run: its figures, its citation, and the prediction beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import Main, main, refused
from logs import by_quantity
from published import rows

from bf16prof.imports.published import find_published, published_names

__all__ = ["main"]

PUBLISHED = "published:deepspeed-bf16-example"


def test_the_published_figures_are_those_of_the_collection() -> None:
    """The figures were copied twice, by hand: into the package, and into the tests' collection of
    published numbers."""
    baseline, low = find_published("deepspeed-bf16-example").records

    assert "deepspeed-bf16-example" in published_names()
    for metric, field in (("allocated", "allocated_bytes"), ("peak_allocated", "run_peak_allocated_bytes")):
        for row, record in zip(rows("example README", metric), (baseline, low), strict=True):
            assert getattr(record, field) == pytest.approx(row["value"] * 2**30, abs=1)
    assert [(record.step_time_s, record.loss) for record in (baseline, low)] == [(0.6016, 3.09), (0.6427, 3.12)]
    losses = [(said.steps, said.mean, said.deviation, said.decimals) for said in (baseline.loss_summary, low.loss_summary) if said]
    assert losses == [(1000, 2.78, 1.56, 2), (1000, 2.9, 2.37, 2)]
    assert find_published("deepspeed-bf16-example").open == ("the vocabulary",)
    for record in (baseline, low):
        assert record.notes[0].startswith("published in deepspeedai/DeepSpeedExamples training/bf16_master_weight/README.md @")
        assert record.notes[0].endswith(": https://github.com/deepspeedai/DeepSpeedExamples/tree/master/training/bf16_master_weight")


def test_prediction_against_publication(main: Main, tmp_path: Path) -> None:
    """Both steady states and the baseline's peak are what was printed; the other peak is lower
    since DeepSpeed 0.19.4."""
    code, out, _ = main("report", PUBLISHED, "--json", "-o", tmp_path / "published.html")
    document = json.loads(out)

    assert code == 0
    baseline, low = by_quantity(document, "bf16-fp32-master"), by_quantity(document, "bf16-full-autocast")
    for comparison in (baseline["allocated_bytes"], baseline["run_peak_allocated_bytes"], low["allocated_bytes"]):
        assert 0 < abs(comparison["values"]["estimate"] - comparison["values"]["import"]) <= comparison["rounding"] == 5_368_709
    assert -0.0075 < low["run_peak_allocated_bytes"]["errors"]["estimate"] < -0.001
    page = (tmp_path / "published.html").read_text()
    assert "as printed" in page
    assert "published in deepspeedai/DeepSpeedExamples" in page


def test_the_published_run_has_no_folder_to_write_into(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    code, out, _ = main("report", PUBLISHED)

    assert code == 0
    (row,) = (line for line in out.splitlines() if line.startswith("zero3-bf16-full-autocast") and "16.17" in line)
    assert row.split()[1:] == ["16.17", "16.17", "as", "printed", "18.93", "18.83", "-0.51", "642.7", "3.12"], "a peak of the whole run"
    assert "peak: of the whole run" in out
    code, out, _ = main("report", PUBLISHED, "-v")
    assert "as printed (+3.64 MiB)" in out
    (summary,) = (line for line in out.splitlines() if line.startswith("zero3-w4-bf16-full-autocast  16.17 GiB"))
    assert "18.93 GiB" in summary, "a peak of the whole run, where there is no other"
    assert "0 of 2 predictions exact to the byte, 2 as far as was printed." in out
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    (tmp_path / "report.html").write_text("an older page", encoding="utf-8")
    assert "exists" in refused(main("report", PUBLISHED)), "what others wrote is not replaced"
    assert main("report", PUBLISHED, "--force")[0] == 0
    page = (tmp_path / "report.html").read_bytes()
    assert main("report", PUBLISHED)[0] == 0, "a page of this program is"
    assert (tmp_path / "report.html").read_bytes() == page
    (tmp_path / "run.json").touch()
    assert "exists" in refused(main("report", PUBLISHED)), "but not that of a run"


def test_the_published_losses_are_a_table_with_its_citation(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, 2.90 included, and with nothing that nobody published: no curve, no seed, no
    time, no command."""
    monkeypatch.chdir(tmp_path)

    _, out, _ = main("report", PUBLISHED, "--fail-over", "1", "-o", "a.html", "-o", "a.md")
    main("report", PUBLISHED, "--json", "-o", "b.html")

    assert re.search(r"zero3-w4-bf16-full-autocast +1000 +3.12 +2.90 +2.37\n", out)
    assert "published in deepspeedai/DeepSpeedExamples training/bf16_master_weight/README.md @45b4b715" in out
    markdown, page = (tmp_path / "a.md").read_text(encoding="utf-8"), (tmp_path / "a.html").read_bytes()
    assert re.search(r"\| zero3-w4-bf16-fp32-master +\| +1000 \| +3.09 \| +2.78 \| +1.56 \|", markdown)
    assert b'<section id="losses">' in page
    assert page == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.md", "b.html"], "JSON goes without a page of its own"


def test_an_unknown_published_run_names_those_that_there_are(main: Main) -> None:
    said = refused(main("report", "published:moby-dick"))
    assert all(f"published:{name}" in said for name in published_names())


def test_every_published_run_is_listed_with_its_error_and_what_is_open(main: Main) -> None:
    code, out, _ = main("published", "list", "--json")
    document = json.loads(out)

    assert code == 0
    assert {row["name"] for row in document["rows"]} == set(published_names()) == {each["name"] for each in document["published"]}
    assert all(each["citation"] and each["url"].startswith("https://") and each["open"] for each in document["published"])
    errors = {(row["name"], row["quantity"], row["case"][:5]): row["error"] for row in document["rows"]}
    # Allocated memory between steps follows from the job alone.
    assert abs(errors["issue-7434", "allocated_bytes", "zero3"]) < 0.0005
    assert abs(errors["issue-3734", "allocated_bytes", "zero3"]) < 0.0005
    assert abs(errors["opt-1.3b-single", "allocated_bytes", "zero0"]) < 0.0005
    assert abs(errors["galactica-30b-init", "phases.init.peak_bytes", "zero3"]) < 0.001
    # Issue 3734, ZeRO-2: what is missing is the partition of the gradients, 2 bytes of an eighth of
    # 13.0e9 elements, to 5 %.
    zero2 = next(row for row in document["rows"] if row["name"] == "issue-3734" and row["case"].startswith("zero2"))
    assert zero2["published_bytes"] - zero2["predicted_bytes"] == pytest.approx(2 * 13_015_864_320 / 8, rel=0.05)


def test_a_lower_bound_is_said_as_one(main: Main) -> None:
    """LLaMA-7B ran out of memory in the step: what was allocated and what was asked for together is
    the least that it needs."""
    _, out, _ = main("published", "list")

    (line,) = (line for line in out.splitlines() if line.startswith("llama-7b-v100-oom"))
    assert re.search(r"at least 31.42 GiB +31.42 GiB +\+0.03 %", line)
