"""What people copy: the examples and the docstrings' lines run, in an empty directory."""

from __future__ import annotations

import doctest
import runpy
from pathlib import Path

import pytest

from bf16prof import api

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)

    runpy.run_path(str(path))

    assert "fits" in capsys.readouterr().out


def test_the_docstrings_lines_print_what_stands_there() -> None:
    assert doctest.testmod(api) == (0, 6)
