"""What takes its time says so on a terminal, and nowhere else."""

from __future__ import annotations

import sys

import pytest

from bf16prof.commands.working import working


def counted(quiet: bool) -> None:
    with working("judging", 3, quiet) as done:
        for number in range(4):
            done(number)


def test_a_terminal_sees_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    counted(quiet=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert "judging" in err
    assert "3/3" in err


@pytest.mark.parametrize(("is_terminal", "quiet"), [(False, False), (True, True)])
def test_a_pipe_and_a_quiet_terminal_see_nothing(
    is_terminal: bool, quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    counted(quiet)
    assert capsys.readouterr() == ("", "")
