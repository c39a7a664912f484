"""Run directories: read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fixtures
from report_fixtures import run_folder

from bf16prof import runs
from bf16prof.documents import document
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
    assert "is no number of JSON" in message


def test_an_empty_folder_a_missing_one_and_a_file_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    assert refusal(tmp_path) == f"cannot read {tmp_path / 'run.json'}: No such file or directory"
    assert "No such file or directory" in refusal(tmp_path / "none")
    assert "Not a directory" in refusal(tmp_path / "file")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))


def test_every_document_states_its_schema() -> None:
    written = document([fixtures.bare_record()], extra={"a": None})

    assert list(written) == ["schema_version", "records", "extra"]
    assert json.loads(json.dumps(written))["records"][0]["reserved_bytes"] is None
