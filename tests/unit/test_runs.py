"""Run directories: read strictly, written atomically, replaced only when asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fixtures
from report_fixtures import run_folder

from bf16prof import runs
from bf16prof.documents import document, json_text
from bf16prof.errors import InputError

__all__ = ["run_folder"]


def refusal(path: Path) -> str:
    """The message with which a run directory is refused: one line, exit code 2."""
    with pytest.raises(InputError) as caught:
        runs.load(path)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value.message


def test_what_was_saved_is_what_is_loaded(run_folder: Path) -> None:
    saved = fixtures.run()

    loaded = runs.load(run_folder)

    assert (loaded.manifest, loaded.records) == (saved.manifest, saved.records)
    assert runs.load(run_folder / "run.json") == loaded
    assert {p.name for p in run_folder.iterdir()} == {"run.json", "records.json"}, "no temporary file stays behind"


def test_hostile_names_survive_the_disk(tmp_path: Path) -> None:
    hostile = fixtures.hostile_run()
    runs.save(runs.Run(tmp_path, hostile.manifest, hostile.records))

    loaded = runs.load(tmp_path)

    assert (loaded.manifest, loaded.records) == (hostile.manifest, hostile.records)


Change = Callable[[dict[str, Any]], object]

DAMAGED_RECORDS: dict[str, tuple[Change, list[str]]] = {
    "another schema version": (lambda d: d.update(schema_version=2), ["schema_version is 2", "reads 1"]),
    "no schema version": (lambda d: d.pop("schema_version"), ["schema_version is None"]),
    "schema version as text": (lambda d: d.update(schema_version="1"), ["schema_version is '1'"]),
    "schema version as bool": (lambda d: d.update(schema_version=True), ["schema_version"]),
    "no records": (lambda d: d.pop("records"), ["records", "required"]),
    "records of another kind": (lambda d: d.update(records={"a": 1}), ["records", "valid array"]),
    "a missing field": (lambda d: d["records"][1].pop("case"), ["records.1.case", "required"]),
    "an unknown field": (lambda d: d["records"][0].update(bogus=1), ["records.0.bogus", "Unexpected"]),
    "an unknown field deep inside": (lambda d: d["records"][0]["case"].update(gpu=1), ["records.0.case.gpu"]),
    "text for bytes": (lambda d: d["records"][0].update(reserved_bytes="12"), ["records.0.reserved_bytes", "integer"]),
    "float for bytes": (lambda d: d["records"][0].update(reserved_bytes=12.0), ["records.0.reserved_bytes", "integer"]),
    "bool for bytes": (lambda d: d["records"][0].update(reserved_bytes=True), ["records.0.reserved_bytes", "integer"]),
    "bytes beyond 64 bits": (lambda d: d["records"][0].update(reserved_bytes=2**63), ["records.0.reserved_bytes", "less than"]),
    "negative bytes": (lambda d: d["records"][0].update(reserved_bytes=-1), ["records.0.reserved_bytes", "greater than"]),
    "a component below zero": (lambda d: d["records"][0]["components"].update(other=-1), ["records.0.components.other", "greater than"]),
    "a peak's component below zero": (
        lambda d: d["records"][0].update(peak_components={"other": -1}), ["records.0.peak_components.other", "greater than"],
    ),
    "an item below zero": (
        lambda d: d["records"][0].update(items=[{"component": "other", "name": "x", "bytes": -1}]),
        ["records.0.items.0.bytes", "greater than"],
    ),
    "negative seconds": (lambda d: d["records"][0].update(step_time_s=-0.5), ["records.0.step_time_s", "greater than"]),
    "negative parameters": (lambda d: d["records"][0].update(parameters=-5), ["records.0.parameters", "greater than"]),
    "no ranks": (lambda d: d["records"][0]["case"].update(world_size=0), ["records.0.case.world_size", "greater than"]),
    "stage 4": (lambda d: d["records"][0]["case"].update(zero_stage=4), ["records.0.case.zero_stage", "less than"]),
    "an unknown source": (lambda d: d["records"][0].update(source="guess"), ["records.0.source", "'estimate'"]),
    "an unknown component": (lambda d: d["records"][0]["components"].update(bogus=1), ["records.0.components.bogus"]),
    "an unknown phase": (lambda d: d["records"][0]["phases"].update(lunch={}), ["records.0.phases.lunch"]),
    "text for seconds": (lambda d: d["records"][0].update(step_time_s="fast"), ["records.0.step_time_s", "number"]),
    "a list for a name": (lambda d: d["records"][0]["case"].update(profile=["x"]), ["records.0.case.profile", "string"]),
    "components that do not add up": (lambda d: d["records"][0].update(allocated_bytes=7), ["records.0", "components add up to"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED_RECORDS)
def test_damaged_records_are_refused_by_file_and_field(case: str, run_folder: Path) -> None:
    change, expected = DAMAGED_RECORDS[case]
    path = run_folder / "records.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

    message = refusal(run_folder)

    assert message.startswith(f"{path}: ")
    assert all(part in message for part in expected), message


DAMAGED_MANIFESTS: dict[str, tuple[Change, list[str]]] = {
    "an unknown status": (lambda d: d.update(status="fine"), ["status", "'finished'"]),
    "a missing field": (lambda d: d.pop("cases"), ["cases", "required"]),
    "an unknown field": (lambda d: d.update(bogus=1), ["bogus"]),
    "numbers in argv": (lambda d: d.update(argv=[1]), ["argv.0", "string"]),
    "another schema version": (lambda d: d.update(schema_version=0), ["schema_version is 0"]),
    "a case without a recipe": (lambda d: d["cases"][0]["case"].pop("recipe"), ["cases.0.case.recipe"]),
}


@pytest.mark.parametrize("case", DAMAGED_MANIFESTS)
def test_a_damaged_manifest_is_refused_by_file_and_field(case: str, run_folder: Path) -> None:
    change, expected = DAMAGED_MANIFESTS[case]
    path = run_folder / "run.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

    message = refusal(run_folder)

    assert message.startswith(f"{path}: ")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("name", ["run.json", "records.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a complete JSON document"),
        (b"{", "not a complete JSON document"),
        (b"[]", "schema_version is None"),
        (b"null", "schema_version is None"),
        (b"\x89PNG\xff\xfe", "not UTF-8 text"),
        (b"[" * 100_000, "not a complete JSON document"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "not a complete JSON document"),
        (b'{"schema_version": 1} trailing', "not a complete JSON document"),
        (b'{"schema_version": NaN}', "schema_version is nan"),
    ],
    ids=["empty", "brace", "list", "null", "binary", "deep", "digits", "trailing", "nan"],
)
def test_a_file_that_is_no_document_is_refused(name: str, content: bytes, expected: str, run_folder: Path) -> None:
    (run_folder / name).write_bytes(content)

    message = refusal(run_folder)

    assert str(run_folder / name) in message
    assert expected in message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["run.json", "records.json"])
def test_a_truncated_file_is_refused(name: str, share: float, run_folder: Path) -> None:
    content = (run_folder / name).read_bytes()
    (run_folder / name).write_bytes(content[: int(len(content) * share)])

    assert "not a complete JSON document" in refusal(run_folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["loss", "step_time_s", "power_w", "reserved_bytes"])
def test_numbers_that_are_none_are_refused(number: str, field: str, run_folder: Path) -> None:
    path = run_folder / "records.json"
    content = json.loads(path.read_text())
    content["records"][2][field] = "HERE"
    path.write_text(json.dumps(content).replace('"HERE"', number))

    assert f"{path}: records.2.{field}: " in refusal(run_folder)


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_numbers_that_are_none_are_refused_inside_the_profile_too(number: str, run_folder: Path) -> None:
    path = run_folder / "run.json"
    content = json.loads(path.read_text())
    content["profile"] = {"optimizer": {"lr": "HERE"}}
    path.write_text(json.dumps(content).replace('"HERE"', number))

    message = refusal(run_folder)
    assert message.startswith(f"{path}: ")
    assert "profile: Out of range float" in message


def test_an_empty_folder_a_missing_one_and_a_file_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    assert refusal(tmp_path) == f"cannot read {tmp_path / 'run.json'}: No such file or directory"
    assert "No such file or directory" in refusal(tmp_path / "none")
    assert "Not a directory" in refusal(tmp_path / "file")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))


# Writing.


def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(InputError, match="cannot write /dev/full: No space left on device"):
        runs.write_text(Path("/dev/full"), "x" * 100)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # GIVEN a file, and a disk that fills up while its successor is synchronised
    path = tmp_path / "run.json"
    path.write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    # WHEN it is written anew
    with pytest.raises(InputError, match="No space left on device"):
        runs.write_text(path, "new")

    # THEN the old one is whole and no temporary file is left
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["/proc/self/run.json", "/proc/run.json", "/none/run.json"])
def test_a_folder_that_takes_no_files_is_one_line(path: str) -> None:
    with pytest.raises(InputError, match=f"cannot write {path}: "):
        runs.write_text(Path(path), "x")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for path in (Path("/proc/self/run"), tmp_path / "file" / "run", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot create") as caught:
            runs.create(path)
        assert "None" not in caught.value.message
        assert "\n" not in caught.value.message


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    # GIVEN a run, and a writer that is killed once its temporary file is full and before it takes the old one's place
    path = tmp_path / "run.json"
    path.write_text("old")
    program = f"""
import os, pathlib, signal
from bf16prof.runs import write_text
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

    runs.write_text(path, "new")

    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.stat().st_ino != before, "written beside the old file and renamed, not over it"


@pytest.mark.parametrize("name", ["x" * 255, "漢" * 85, "é" * 127])
def test_a_name_as_long_as_the_file_system_takes_is_written(name: str, tmp_path: Path) -> None:
    runs.write_text(tmp_path / name, "content")

    assert (tmp_path / name).read_text() == "content"


def test_lists_of_numbers_are_on_one_line_and_strings_are_left_alone() -> None:
    value = {"sizes": [1, -2, 3.5e-7, 10**12], "text": "[1,  2]\n[\n 3 ]", "empty": [], "mixed": [1, "a"], "nested": [[1], [2, 3]]}

    text = json_text(value)

    assert json.loads(text) == value
    assert '"sizes": [1, -2, 3.5e-07, 1000000000000]' in text


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        runs.write_json(tmp_path / "x.json", {"loss": float("nan")})

    assert list(tmp_path.iterdir()) == []


# Making run directories.


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    runs.create(tmp_path / "a" / "b")

    assert (tmp_path / "a" / "b").is_dir()


def test_an_empty_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    runs.create(tmp_path)
    runs.create(tmp_path, force=True)

    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_replaced_without_force(run_folder: Path) -> None:
    with pytest.raises(InputError, match="exists and is not empty") as caught:
        runs.create(run_folder)

    assert "--force" in caught.value.hint
    assert runs.load(run_folder)


def test_force_replaces_a_run_and_touches_nothing_else(run_folder: Path) -> None:
    # GIVEN a run directory with all that a run writes, and with files of the user's own
    case = run_folder / fixtures.case().label
    case.mkdir()
    (case / "rank0.json").write_text("{}")
    (run_folder / "report.html").write_text("report")
    (run_folder / "loss.csv").write_text("losses")
    (run_folder / "notes.txt").write_text("mine")
    (run_folder / "data").mkdir()
    (run_folder / "data" / "corpus.txt").write_text("mine too")

    # WHEN
    runs.create(run_folder, force=True)

    # THEN
    assert {str(p.relative_to(run_folder)) for p in run_folder.rglob("*")} == {"notes.txt", "data", "data/corpus.txt"}


def test_force_does_not_replace_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(InputError, match=r"holds no run.json, so --force will not replace it"):
        runs.create(tmp_path, force=True)

    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_every_document_states_its_schema() -> None:
    written = document([fixtures.bare_record()], extra={"a": None})

    assert list(written) == ["schema_version", "records", "extra"]
    assert json.loads(json.dumps(written))["records"][0]["reserved_bytes"] is None
