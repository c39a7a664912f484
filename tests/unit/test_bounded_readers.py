"""No reader of people's files waits for ever or fills the memory: what is no regular file is
refused, in one line and at once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Main, main, refused
from logs import LOSSES
from report_fixtures import run_folder

from bf16prof import files
from bf16prof.errors import InputError
from bf16prof.files import last_lines, opened, read_up_to
from bf16prof.measuring.data import validate_spec
from bf16prof.measuring.results import load_rank

__all__ = ["main", "run_folder"]

PATIENCE_S = 0.3


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", PATIENCE_S)


@pytest.fixture(params=["pipe", "/dev/zero", "/dev/null", "socket", "folder"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """A function that puts something that is no regular file in a place."""

    def put(place: Path) -> Path:
        if request.param == "pipe":
            os.mkfifo(place)
        elif request.param == "folder":
            place.mkdir()
        elif request.param == "socket":
            os.mknod(place, 0o140644)
        else:
            place.symlink_to(request.param)
        return place

    start = time.monotonic()
    yield put
    assert time.monotonic() - start < 30


def test_profile(odd: Callable[[Path], Path], main: Main, tmp_path: Path) -> None:
    assert "cannot read" in refused(main("estimate", "-p", odd(tmp_path / "p.toml")))


def test_configurations(odd: Callable[[Path], Path], main: Main, tmp_path: Path) -> None:
    path = odd(tmp_path / "config.json")

    assert str(path) in refused(main("estimate", "--hf-config", path))
    assert str(path) in refused(main("estimate", "-p", "cpu-demo", "--ds-config", path))


def test_safetensors(odd: Callable[[Path], Path], main: Main, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "data" / "hf-gpt2.json", tmp_path / "config.json")
    (tmp_path / "p.toml").write_text('[model]\nhf_config = "config.json"\nsafetensors = "model.safetensors"\n[workload]\n')
    odd(tmp_path / "model.safetensors")

    assert "cannot read" in refused(main("estimate", "-p", tmp_path / "p.toml"))


@pytest.mark.parametrize("name", ["run.json", "records.json"])
def test_run_directories(name: str, odd: Callable[[Path], Path], main: Main, run_folder: Path) -> None:
    (run_folder / name).unlink()
    odd(run_folder / name)

    assert "cannot read" in refused(main("report", run_folder))
    assert "cannot read" in refused(main("estimate", "-p", "cpu-demo", "--calibrate", run_folder))


def test_a_page_that_is_none(odd: Callable[[Path], Path], main: Main, run_folder: Path, tmp_path: Path) -> None:
    """The report's own page, of which it looks whether that is one of ours."""
    odd(run_folder / "report.html")
    code, _, err = main("report", run_folder)

    assert code in (0, 2), err
    assert "Traceback" not in err


def test_rank_files(odd: Callable[[Path], Path], tmp_path: Path) -> None:
    odd(tmp_path / "rank0.json")
    with pytest.raises(InputError, match="cannot read"):
        load_rank(tmp_path, 0)


def test_logs(odd: Callable[[Path], Path], main: Main, tmp_path: Path) -> None:
    path = odd(tmp_path / "train.log")

    assert "cannot read" in refused(main("import", path, "--gpus", "2", "--zero", "1", "--recipe", "fp32", "-d", tmp_path / "run"))


def test_texts(odd: Callable[[Path], Path], tmp_path: Path) -> None:
    path = odd(tmp_path / "text")
    with pytest.raises(InputError, match=r"not a regular file|Is a directory"):
        validate_spec(f"text:{path}", readable=True)


def test_log_tails(odd: Callable[[Path], Path], tmp_path: Path) -> None:
    assert last_lines(odd(tmp_path / "rank0.log"), 3) == []


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        stream.truncate(2**33)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\nfirst\n\xffsecond\n\n")

    assert last_lines(log, 2) == ["first", "\ufffdsecond"]


def test_a_pipe_given_on_purpose_is_read(main: Main) -> None:
    """As `--ds-config <(command)` in a shell, of which the program gets `/dev/fd/N`."""
    reader, writer = os.pipe()
    os.write(writer, json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}).encode())
    os.close(writer)
    code, out, err = main("estimate", "-p", "cpu-demo", "--gpus", "2", "--ds-config", f"/dev/fd/{reader}", "--json")
    os.close(reader)

    assert code == 0, err
    assert [record["case"]["zero_stage"] for record in json.loads(out)["records"]] == [2]


def test_a_pipe_that_says_nothing_more_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"{")
    with pytest.raises(InputError, match="nobody writes to this pipe"):
        read_up_to(100, Path(f"/dev/fd/{reader}"), pipes=True)
    os.close(writer)
    os.close(reader)


def test_a_pipe_without_end_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_S", 0.0)
    reader, writer = os.pipe()
    os.write(writer, b"{")
    with pytest.raises(InputError, match="no end after"):
        read_up_to(100, Path(f"/dev/fd/{reader}"), pipes=True)
    os.close(writer)
    os.close(reader)


def test_log(tmp_path: Path, main: Main) -> None:
    """A log through a pipe, which `import` takes too."""
    reader, writer = os.pipe()
    os.write(writer, LOSSES.encode())
    os.close(writer)
    code, _, err = main("import", f"/dev/fd/{reader}", "--gpus", "2", "--zero", "1", "--recipe", "fp32", "-d", tmp_path / "run", "--quiet")
    os.close(reader)

    assert code == 0, err


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\udcff\0"])
def test_a_path_that_cannot_be_one_is_bad_input(path: str) -> None:
    with pytest.raises(InputError, match="cannot read"), opened(Path(path)):
        pytest.fail("it was opened")
