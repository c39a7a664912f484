"""Temporary folders: gone with their process, or with the next one where that was killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bf16prof.scratch import LOCK, temporary_folder

HOLDER = (
    "import sys\nfrom bf16prof.scratch import temporary_folder\n"
    "with temporary_folder() as folder:\n    (folder / 'record.json').write_text('x')\n"
    "    print(folder, flush=True)\n    sys.stdin.read()\n"
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that nobody else uses."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_nothing_is_left(place: Path) -> None:
    with temporary_folder() as folder:
        (folder / "log").write_text("x")
        assert folder.parent == place

    assert list(place.iterdir()) == []


def test_the_next_removes_what_a_killed_process_has_left(place: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        with temporary_folder():
            assert (theirs / "record.json").exists(), "somebody uses it"
        holder.kill()
    assert theirs.exists()

    with temporary_folder() as ours:
        assert list(place.iterdir()) == [ours]


def test_what_is_none_of_ours_stays(place: Path) -> None:
    (place / "bf16prof-notes").mkdir()
    (place / "bf16prof-notes" / "a").write_text("mine")
    (place / "bf16prof-file").write_text("mine")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / LOCK).write_text("")
    (place / "bf16prof-link").symlink_to(place / "elsewhere")
    before = sorted(place.rglob("*"))
    with temporary_folder():
        pass

    assert sorted(place.rglob("*")) == before
