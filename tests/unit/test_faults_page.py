"""The page about faults says what commands do now: its rows of broken input are tried again, and it
has a row for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Main, main
from fault_table import OF_INPUT, PAGE, SPOILED, FaultRow, line, merged, parsed, reading, table
from soaking import CASE, COMMANDS, FAULTS, LOG, SLOW

from bf16prof import files

__all__ = ["main"]

ROWS = parsed(PAGE.read_text(encoding="utf-8"))


def test_every_fault_of_every_command_has_a_row() -> None:
    wanted = {(fault, command) for fault, each in FAULTS.items() if fault != "nothing" for command in each.only}
    wanted |= {(OF_INPUT + fault, command) for fault in SPOILED for command in COMMANDS}

    assert sorted((row.fault, command) for row in ROWS for command in row.commands) == sorted(wanted)


def test_no_row_has_a_wrong_exit_code() -> None:
    for row in ROWS:
        allowed = FAULTS[row.fault].codes if row.fault in FAULTS else (0, 2)
        assert set(row.codes) <= set(allowed), row
        assert row.said or not {2, 3} & set(row.codes), row


@pytest.fixture
def old_run(main: Main, tmp_path: Path) -> Path:
    code, _, err = main("import", LOG, *CASE, "-d", tmp_path / "old", "-q")
    assert code == 0, err
    return tmp_path / "old"


def test_what_is_refused_is_refused_in_these_words(main: Main, tmp_path: Path, old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", 0.1)
    tried = [
        (row, command)
        for row in ROWS
        if row.fault.startswith(OF_INPUT) and row.codes == (2,)
        for command in row.commands
        if command not in SLOW
    ]
    for index, (row, command) in enumerate(tried):
        place = tmp_path / str(index)
        words, path = reading(command, place, old_run)
        SPOILED[row.fault.removeprefix(OF_INPUT)](path)
        code, _, err = main(*words)
        assert (code, line(err, place)) == (2, row.said), (row, command)
    assert len(tried) > len(SPOILED)


def test_a_table_is_read_as_it_was_written() -> None:
    rows = [FaultRow("a", ("x",), 5, (0, 143), "b | c"), FaultRow("a", ("y",), 5, (0, 143), "b | c"), FaultRow("d", ("x",), 1, (-9,), "")]

    assert parsed(f"<!-- tables -->\n{table(rows)}<!-- end of tables -->\n") == merged(rows)
    assert merged(rows)[0].commands == ("x", "y")
