"""Files: written atomically or not at all, read only as far as they are files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bf16prof import files
from bf16prof.documents import json_text
from bf16prof.errors import InputError


def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(InputError, match="cannot write /dev/full: No space left on device"):
        files.write_text(Path("/dev/full"), "x" * 100)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # GIVEN a file, and a disk that fills up while its successor is synchronised
    path = tmp_path / "run.json"
    path.write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    # WHEN it is written anew
    with pytest.raises(InputError, match="No space left on device"):
        files.write_text(path, "new")

    # THEN the old one is whole and no temporary file is left
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["/proc/self/run.json", "/proc/run.json", "/none/run.json"])
def test_a_folder_that_takes_no_files_is_one_line(path: str) -> None:
    with pytest.raises(InputError, match=f"cannot write {path}: "):
        files.write_text(Path(path), "x")


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    # GIVEN a run, and a writer that is killed once its temporary file is full and before it takes
    # the old one's place
    path = tmp_path / "run.json"
    path.write_text("old")
    program = f"""
import os, pathlib, signal
from bf16prof.files import write_text
pathlib.Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
write_text(pathlib.Path({str(path)!r}), "new " * 100000)
"""

    # WHEN
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=30)

    # THEN
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    leftovers = [p for p in tmp_path.iterdir() if p != path]
    assert len(leftovers) == 1, "the writer did get as far as the rename"
    assert leftovers[0].name.startswith(".run.json.")


def test_a_rewritten_file_is_readable_for_others_and_a_new_inode(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    before = path.stat().st_ino

    files.write_text(path, "new")

    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.stat().st_ino != before, "written beside the old file and renamed, not over it"


@pytest.mark.parametrize("name", ["x" * 255, "漢" * 85, "é" * 127])
def test_a_name_as_long_as_the_file_system_takes_is_written(name: str, tmp_path: Path) -> None:
    files.write_text(tmp_path / name, "content")

    assert (tmp_path / name).read_text() == "content"


def test_lists_of_numbers_are_on_one_line_and_strings_are_left_alone() -> None:
    value = {"sizes": [1, -2, 3.5e-7, 10**12], "text": "[1,  2]\n[\n 3 ]", "empty": [], "mixed": [1, "a"], "nested": [[1], [2, 3]]}

    text = json_text(value)

    assert json.loads(text) == value
    assert '"sizes": [1, -2, 3.5e-07, 1000000000000]' in text


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3).map(lambda items: ["", *items]) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
"""No list of numbers alone, which is on one line here."""


@settings(deadline=None, max_examples=100)
@given(TREES)
def test_the_text_is_that_of_the_standard_library(value: Any) -> None:
    assert json_text(value) == json.dumps(value, indent=2)


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})

    assert list(tmp_path.iterdir()) == []
