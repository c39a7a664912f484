"""Who may write a run directory, and what --force may remove: our own files, and nothing else
whatever it is called."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import report_fixtures as fixtures
from report_fixtures import run_folder

from bf16prof import claims, locks, runs
from bf16prof.claims import claimed, new_folder, owned
from bf16prof.errors import InputError

__all__ = ["run_folder"]

CASE = fixtures.case().label


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and every link by what it names."""
    names = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): str(p.readlink()).encode() if p.is_symlink() else p.read_bytes() for p in names if not p.is_dir()}


def replace(folder: Path, *beside: Path) -> None:
    with claimed(folder, "x", force=True, beside=beside) as claim:
        claim.clear()


def refusal(folder: Path, *, force: bool = False) -> InputError:
    """How claiming a folder is refused: in one line, with exit code 2, and with all that was in it
    untouched."""
    before = tree(folder)
    with pytest.raises(InputError) as caught, claimed(folder, "x", force=force):
        pytest.fail("it was claimed")
    for found in (before, after := tree(folder)):
        found.pop(".bf16prof.lock", None)  # one that a killed process has left goes
    assert after == before
    assert (caught.value.exit_code, caught.value.message.count("\n")) == (2, 0)
    return caught.value


@pytest.fixture
def old_run(run_folder: Path) -> Path:
    """A run directory with all that a run writes, and with the temporary file of a killed
    writer."""
    case = run_folder / CASE
    case.mkdir()
    for name in ("spec.json", "exits.json", "launcher.log", "rank0.json", "rank1.json", "rank0.log", ".rank1.json.0123abcd.part"):
        (case / name).write_text("{}")
    (run_folder / "report.html").write_bytes(b"<html><head>" + claims.REPORT_HEAD)
    for name in ("loss.csv", "quality.csv", ".bf16prof.lock", ".run.json.89abcdef.part"):
        (run_folder / name).write_text("ours")
    return run_folder


def test_force_replaces_a_run_whole(old_run: Path) -> None:
    replace(old_run)

    assert list(old_run.iterdir()) == []


def test_without_force_a_run_is_refused(old_run: Path) -> None:
    error = refusal(old_run)

    assert "exists and is not empty" in error.message
    assert "--force" in error.hint


def test_nothing_is_removed_before_it_is_said(old_run: Path) -> None:
    """The old run goes when the new one begins, not when it is claimed: predictions may fail in
    between."""
    before = tree(old_run)
    with claimed(old_run, "x", force=True):
        now = tree(old_run)
    del before[".bf16prof.lock"], now[".bf16prof.lock"]

    assert now == before


@pytest.mark.parametrize(
    "name",
    [
        "zero1-winter-photos/beach.jpg",
        f"{CASE}/notes.txt",
        f"{CASE}/rank2.json",  # of two ranks
        f"{CASE}/rank01.json",
        f"{CASE}/photos/beach.jpg",
        "zero2-w2-bf16-full-old/rank0.json",  # no case of this run
        "zero0-w4-mine/rank0.json",
        "notes.txt",
        "rank0.json",
        "spec.json",
        ".hidden",
        ".notes.0123abcd.part",
        "run.json.bak",
    ],
)
def test_whatever_is_not_of_the_run_stops_force_before_anything_is_removed(name: str, old_run: Path) -> None:
    (old_run / name).parent.mkdir(parents=True, exist_ok=True)
    (old_run / name).write_text("mine")

    error = refusal(old_run, force=True)

    assert "which the run in it has not written: nothing was removed" in error.message
    assert name.split("/", maxsplit=1)[0] in error.message


def test_an_empty_folder_of_the_users_stops_it_too(old_run: Path) -> None:
    (old_run / "zero1-w2-empty").mkdir()

    refusal(old_run, force=True)
    assert (old_run / "zero1-w2-empty").is_dir()


def test_a_page_of_the_users_own_stops_it_too(old_run: Path) -> None:
    (old_run / "report.html").write_text("<html>my thesis</html>")

    assert "holds report.html" in refusal(old_run, force=True).message


def test_several_foreign_files_are_counted(old_run: Path) -> None:
    for name in ("a", "b", "c"):
        (old_run / name).touch()

    assert "holds a and 2 more, which" in refusal(old_run, force=True).message


@pytest.mark.parametrize("what", [CASE, f"{CASE}/rank0.log", "records.json", "report.html", "run.json"])
def test_nothing_is_reached_through_a_link(what: str, old_run: Path, tmp_path: Path) -> None:
    """A link in the place of what is ours: its target stays, and so does the link."""
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    (old_run / what).rename(elsewhere)
    (old_run / what).symlink_to(elsewhere)
    before = tree(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()

    refusal(old_run, force=True)
    assert (tree(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()) == before


@pytest.mark.parametrize("recipe", ["../../../photos", "/../photos", "x\0y", "", "../" * 20, "a/b"])
def test_a_hostile_label_names_no_folder(recipe: str, old_run: Path) -> None:
    """A manifest that somebody made to have other folders removed."""
    photos = old_run.parent / "photos"
    photos.mkdir()
    (photos / "rank0.json").write_text("mine")
    manifest = json.loads((old_run / "run.json").read_text())
    for case in manifest["cases"]:
        case["case"]["recipe"] = recipe
    (old_run / "run.json").write_text(json.dumps(manifest))

    assert CASE in refusal(old_run, force=True).message
    assert (photos / "rank0.json").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_a_manifest_that_cannot_be_read_names_nothing(content: str, old_run: Path) -> None:
    (old_run / "run.json").write_text(content)

    assert str(old_run / "run.json") in refusal(old_run, force=True).message


def test_force_does_not_replace_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    assert "holds no run.json, so --force will not replace it" in refusal(tmp_path, force=True).message


def test_what_comes_in_between_stays(old_run: Path) -> None:
    """A user's file that appears after the folder was looked at."""
    with claimed(old_run, "x", force=True) as claim:
        (old_run / CASE / "mine.txt").write_text("mine")
        with pytest.raises(InputError, match="was put there meanwhile"):
            claim.clear()

    assert (old_run / CASE / "mine.txt").read_text() == "mine"
    assert (old_run / "run.json").exists(), "the manifest goes last, so that --force can be tried again"


def test_what_the_command_itself_writes_there_is_expected(old_run: Path) -> None:
    (old_run / "table.md").write_text("of the last time")

    replace(old_run, old_run / "table.md")

    assert list(tree(old_run)) == ["table.md"]


# The folder.


def test_a_new_folder_is_made_with_its_parents_and_goes_if_it_stays_empty(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b", "x"):
        assert (tmp_path / "a" / "b").is_dir()

    assert not (tmp_path / "a" / "b").exists()


def test_a_folder_of_the_users_stays_although_it_is_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError), claimed(tmp_path, "x"):
        raise InputError("the predictions failed")

    assert list(tmp_path.iterdir()) == []


def test_what_was_written_stays(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", "x") as claim:
        (claim.path / "run.json").write_text("{}")

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"], "the lock goes"


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path, old_run: Path) -> None:
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(old_run)
    replace(link)

    assert link.is_symlink()
    assert list(old_run.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")

    paths = (Path("/proc/self/run"), tmp_path / "file" / "run", tmp_path / "file", tmp_path / ("x" * 300), tmp_path / "nowhere")
    for path in paths:
        with pytest.raises(InputError, match="cannot create") as caught, claimed(path, "x"):
            pytest.fail("it was made")
        assert "None" not in caught.value.message
        assert "\n" not in caught.value.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_is_one_line() -> None:
    # not below pytest's own folder: another run of pytest closes that to others at any time
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        said = _claimed_by_nobody(folder)
    finally:
        folder.rmdir()

    assert said == [f"cannot write {folder}: Permission denied", f"cannot create {folder}/new: Permission denied"]


def _claimed_by_nobody(folder: Path) -> list[str]:
    program = f"""
import os
from pathlib import Path
from bf16prof import runs
from bf16prof.claims import claimed
from bf16prof.errors import InputError
os.setuid(65534)
for path in (Path({str(folder)!r}), Path({str(folder)!r}) / "new"):
    try:
        with claimed(path, "x"): print("claimed")
    except InputError as error: print(error.message)
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()


def test_default_names_made_at_once_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(new_folder, ["cpu demo/../x"] * 64))

    assert len(set(made)) == 64
    assert all(path.is_dir() and path.parent == Path("runs") for path in made)


def test_without_a_folder_to_write_to_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")

    with pytest.raises(InputError, match="cannot create runs: "), claimed(None, "x"):
        pytest.fail("it was made")


# The owner.

HOLDER = """
import sys, time
from pathlib import Path
from bf16prof.claims import claimed
from bf16prof.errors import InputError
try:
    with claimed(Path(sys.argv[1]), "x", force=True) as claim:
        print("claimed", flush=True)
        sys.stdin.read()
except InputError as error:
    print(error.message, flush=True)
"""


def contender(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_use_is_refused_and_free_when_its_owner_is_killed(old_run: Path, force: bool) -> None:
    with contender(old_run) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "claimed\n"

        assert f"{old_run} is being written by process {owner.pid} on " in refusal(old_run, force=force).message
        with pytest.raises(InputError, match="is being written by"), owned(old_run):
            pytest.fail("it was claimed")
        owner.kill()
        owner.wait()

    assert (old_run / ".bf16prof.lock").exists(), "a killed process removes nothing"
    replace(old_run)
    assert list(old_run.iterdir()) == []


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    contenders = [contender(tmp_path / "run") for _ in range(8)]
    said = [process.stdout.readline() for process in contenders if process.stdout is not None]
    for process in contenders:
        process.communicate("")

    assert sorted(line == "claimed\n" for line in said) == [False] * 7 + [True]
    # Whoever made the folder removes it again. When another process got its lock in between, nobody
    # does: an empty folder may remain.
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "run"])


def test_one_process_after_the_other_gets_it(tmp_path: Path) -> None:
    """Whoever gets a lock file that its owner has just removed must not believe that it holds the
    lock."""
    count = 300
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add(_number: int) -> None:
        while True:
            try:
                with locks.held(tmp_path / "lock"):
                    counter.write_text(str(int(counter.read_text()) + 1))
                    return
            except locks.Busy:
                continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(count)))

    assert counter.read_text() == str(count)


@pytest.mark.parametrize("plant", ["link", "folder", "pipe"])
def test_what_lies_in_the_locks_place_is_not_written_to(plant: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    lock = run / ".bf16prof.lock"
    if plant == "link":
        lock.symlink_to(victim)
    elif plant == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)

    with pytest.raises(InputError, match="cannot write"), claimed(run, "x"):
        pytest.fail("it was claimed")
    assert victim.read_text() == "mine"


def test_where_the_file_system_knows_no_flock_the_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_descriptor: int, _operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locks.held(tmp_path / "lock"):
        assert locks.is_held(tmp_path / "lock")
        with pytest.raises(locks.Busy, match=f"process {os.getpid()}"), locks.held(tmp_path / "lock"):
            pytest.fail("it was held twice")

    assert not locks.is_held(tmp_path / "lock")


# A run whose process is gone.


@pytest.mark.parametrize("lock", ["left behind", "none"])
def test_a_run_whose_process_is_gone_was_interrupted(lock: str, run_folder: Path) -> None:
    run = runs.load(run_folder)
    statuses = (runs.Status.FINISHED, runs.Status.RUNNING, runs.Status.PLANNED)
    cases = tuple(dataclasses.replace(c, status=s) for c, s in zip(run.manifest.cases, statuses, strict=False))
    runs.save(runs.replace(run, status=runs.Status.RUNNING, cases=cases))
    if lock == "left behind":
        (run_folder / ".bf16prof.lock").touch()
    found = runs.load(run_folder).manifest
    with owned(run_folder):
        living = runs.load(run_folder).manifest

    assert (found.status, living.status) == (runs.Status.INTERRUPTED, runs.Status.RUNNING)
    assert [case.status for case in found.cases[:3]] == ["finished", "interrupted", "interrupted"]
    assert [case.status for case in living.cases[:3]] == ["finished", "running", "planned"]
