"""The script of the GPU check: its table, and what it does where a case fails or no time is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from bf16prof.check.__main__ import Case, Clock, Line, cases, measured, write


def test_a_table_says_measured_predicted_and_the_error(tmp_path: Path) -> None:
    write([Line("zero2", "allocated", 1000, 1010), Line("offload", "-", "failed: no such file")], tmp_path / "table.md")

    assert (tmp_path / "table.md").read_text() == (
        "| case | quantity | measured | predicted | error |\n| --- | --- | ---: | ---: | ---: |\n"
        "| zero2 | allocated | 1,000 | 1,010 | +1.0000% |\n| offload | - | failed: no such file |  |  |\n"
    )


def test_a_case_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()

    (line,) = measured(Case("unknown", ("--profile", "no-such-profile"), {}), Clock(2))

    assert str(line.measured).startswith("failed: ")


def test_a_gpu_is_asked_for_both_sizes_both_segments_and_offloading() -> None:
    names = {case.name for case in cases(cpu=False)}

    assert {"ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "offload", "expandable segments"} <= names
    assert sum("checkpointing" in name for name in names) == 4
