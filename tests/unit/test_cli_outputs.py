"""Nothing of a user's is overwritten: not by a flag that names a file, not by a default, not by
--force where it cannot be meant."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fixtures
from command_line import Main, main, refused
from logs import LOSSES
from report_fixtures import run_folder

from bf16prof import runs
from bf16prof.claims import owned
from bf16prof.commands import output
from bf16prof.files import NotWritten, write_text

__all__ = ["main", "run_folder"]

ESTIMATE = ("estimate", "-p", "cpu-demo", "--gpus", "2")
PLAN = ("plan", "-p", "cpu-demo", "--gpus", "2", "--gpu", "h100-80gb", "--zero", "1", "--recipe", "bf16-full")
IMPORT = ("--zero", "1", "--gpus", "2", "--recipe", "bf16-full")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile in a file of the user's."""
    from bf16prof.profiles.shipped import shipped_text

    path = tmp_path / "my.json"
    path.write_text(shipped_text("presets/cpu-demo.toml"))
    return path


def test_a_file_that_the_command_reads_is_never_its_output(main: Main, profile: Path, tmp_path: Path) -> None:
    before = profile.read_text()
    log = tmp_path / "losses.csv"
    log.write_text(LOSSES)
    config = tmp_path / "config.json"
    shutil.copy(Path(__file__).parents[1] / "data" / "hf-gpt2.json", config)
    link = tmp_path / "link.csv"
    link.symlink_to(log)
    commands = [
        ("estimate", "-p", profile, "-o", profile),
        ("import", log, *IMPORT, "-d", tmp_path / "run", "-o", log),
        ("import", log, *IMPORT, "-d", tmp_path / "run", "-o", link),
        ("estimate", "--hf-config", config, "-o", config),
        ("plan", "--hf-config", config, "--write", config),
    ]
    for command in commands:
        assert "which the command reads" in refused(main(*command, "--force"))

    assert (profile.read_text(), log.read_text()) == (before, LOSSES)
    assert config.read_text().startswith("{")
    assert not (tmp_path / "run").exists()


def test_two_outputs_are_two_files(main: Main, tmp_path: Path) -> None:
    file, alias = tmp_path / "x.json", tmp_path / "." / "y" / ".." / "x.json"
    (tmp_path / "y").mkdir()

    assert "written to by another flag" in refused(main(*ESTIMATE, "-o", file, "-o", alias))
    assert "written to by another flag" in refused(main(*PLAN, "-o", file, "--write", file, "--force"))
    assert not file.exists()


@pytest.mark.parametrize("name", ["run.json", "records.json", "report.html", "loss.csv"])
def test_a_runs_own_files_are_no_outputs(name: str, main: Main, run_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "losses.csv"
    log.write_text(LOSSES)
    folder = tmp_path / "new"
    folder.mkdir()
    manifest = (run_folder / "run.json").read_bytes()

    assert "a file of the run itself" in refused(main("import", log, *IMPORT, "-d", folder, "-o", folder / name, "--force"))
    if name != "report.html":
        assert "which the command reads" in refused(main("report", run_folder, "-o", run_folder / name, "--force"))
    assert (run_folder / "run.json").read_bytes() == manifest


def test_a_folder_is_no_output(main: Main, tmp_path: Path) -> None:
    folder = tmp_path / "x.json"
    folder.mkdir()

    for flags in (("-o", folder), ("-o", folder, "--force")):
        assert "not a file" in refused(main(*ESTIMATE, *flags))
    assert "not a file" in refused(main(*PLAN, "--write", folder, "--force"))


def test_a_file_that_appears_while_the_command_works_stays(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    render = output._render

    def slow(*arguments: Any) -> str | bytes:
        path.write_text("mine")
        return render(*arguments)

    monkeypatch.setattr(output, "_render", slow)

    assert f"cannot write {path}: " in refused(main(*ESTIMATE, "-o", path))
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_that_appears_at_the_last_moment_stays_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    fsync = os.fsync

    def late(descriptor: int) -> None:
        fsync(descriptor)
        path.write_text("mine")

    monkeypatch.setattr(os, "fsync", late)

    with pytest.raises(NotWritten, match="File exists"):
        write_text(path, "new", replace=False)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_without_hard_links_a_new_file_is_still_written_and_an_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    write_text(tmp_path / "x.json", "new", replace=False)
    with pytest.raises(NotWritten):
        write_text(tmp_path / "x.json", "newer", replace=False)

    assert (tmp_path / "x.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


# The report's own page.


def test_a_page_of_the_users_in_a_run_is_not_replaced(main: Main, run_folder: Path) -> None:
    page = run_folder / "report.html"
    page.write_text("<html>mine</html>")

    assert "the file exists" in refused(main("report", run_folder))
    assert page.read_text() == "<html>mine</html>"
    assert main("report", run_folder, "--force")[0] == 0
    assert main("report", run_folder)[0] == 0, "an older page of ours is replaced"


def test_a_run_that_is_being_written_gets_no_page(main: Main, run_folder: Path, tmp_path: Path) -> None:
    with owned(run_folder):
        assert "is being written by process" in refused(main("report", run_folder))
        assert not (run_folder / "report.html").exists()
        elsewhere = main("report", run_folder, "-o", tmp_path / "page.html")

    assert elsewhere[0] == 0
    assert runs.load(run_folder).records == fixtures.run().records


# Modes and links.


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(mask: int, mode: int, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("old")
    old.chmod(0o640)
    before = os.umask(mask)
    try:
        write_text(tmp_path / "new", "x")
        write_text(old, "x")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode
    assert (stat.S_IMODE(old.stat().st_mode), old.read_text()) == (0o640, "x")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have files of somebody else's")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    os.chown(path, 65534, 65534)
    write_text(path, "new")

    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


def test_a_link_is_followed_and_stays(main: Main, tmp_path: Path) -> None:
    target, link, dangling = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "dangling.json"
    target.write_text("old")
    link.symlink_to("target.json")
    dangling.symlink_to(tmp_path / "made.json")

    refused(main(*ESTIMATE, "-o", link))
    assert target.read_text() == "old"
    assert main(*ESTIMATE, "-o", link, "--force")[0] == main(*ESTIMATE, "-o", dangling)[0] == 0
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert target.read_text().startswith("{")
    assert (tmp_path / "made.json").read_text().startswith("{")


def test_a_pipe_is_written_to_where_somebody_reads_it(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()

    assert main(*ESTIMATE, "-o", pipe)[0] == 0
    reader.join()
    assert read[0].startswith("{")

    monkeypatch.setattr("bf16prof.files.PATIENCE_S", 0.1)
    assert f"cannot write {pipe}: " in refused(main(*ESTIMATE, "-o", pipe))
