"""The command line in tests: the whole program in this process or in one of its own, and what its
refusals look like."""

from __future__ import annotations

import csv
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bf16prof import cli

Result = tuple[int, str, str]
Main = Callable[..., Result]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """The whole program in this process: arguments in; exit code, stdout and stderr out."""
    before = {number: signal.getsignal(number) for number in cli.SIGNALS}
    for name in [name for name in os.environ if name.startswith("BF16PROF_") or name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BF16PROF_TRACE", "0")  # a test that wants it says so

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["bf16prof", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)
    gc.enable()


def refused(result: Result) -> str:
    """The one line of a refusal: exit code 2, nothing on stdout, no traceback, at most a hint after
    it."""
    code, out, err = result
    lines = err.splitlines()
    assert code == 2, err
    assert out == ""
    assert lines[0].startswith("bf16prof: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  hint: ")), err
    assert err.isascii() or all(c.isprintable() or c == "\n" for c in err)
    return err


def program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    environment |= {"BF16PROF_TRACE": "0"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "bf16prof", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60, env=environment, **options,
    )  # fmt: skip


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
