"""A run directory: `run.json` (the manifest), `records.json`, one folder per case with one file per rank, `loss.csv`, `report.html`, and
`quality.csv` where updates were watched.

Files are written atomically (a temporary file in the same folder, fsync, rename), so that a kill or a full disk leaves the old file
whole. Files are read strictly: whatever is truncated, of another schema version, or not of the expected type is an `InputError` that
names the file and the field.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from bf16prof.documents import SCHEMA_VERSION, document, json_text
from bf16prof.errors import InputError
from bf16prof.records import STRICT, Case, Device, MemoryRecord

MANIFEST = "run.json"
RECORDS = "records.json"
REPORT = "report.html"
LOSSES = "loss.csv"
QUALITY = "quality.csv"


class Status(StrEnum):
    """How far a run, or one case of it, has come. Anything but `finished` means that numbers are missing or partial.

    `refused`: what the user said could not be used, which only the ranks could find out.
    """

    PLANNED = "planned"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    REFUSED = "refused"
    OOM = "oom"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class CaseStatus:
    """One case of a run: its status, one line on what went wrong, and the end of the failing rank's log."""

    __pydantic_config__ = STRICT

    case: Case
    status: Status
    message: str = ""
    log_tail: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a run was: who ran what, where, and how it ended. Times are ISO 8601 in UTC.

    `origins`: where each value of the profile comes from, by its dotted key; `default` where a key is missing.
    """

    __pydantic_config__ = STRICT

    name: str
    created: str
    status: Status
    device: Device
    argv: tuple[str, ...]
    cases: tuple[CaseStatus, ...]
    profile: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    finished: str | None = None
    origins: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        try:
            json.dumps(self.profile, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"profile: {error}") from error


@dataclass(frozen=True)
class Run:
    """A manifest, its records and the folder that they were read from."""

    path: Path
    manifest: Manifest
    records: tuple[MemoryRecord, ...]


@dataclass(frozen=True)
class _Document:
    __pydantic_config__: ClassVar[Any] = {**STRICT, "extra": "allow"}

    schema_version: int
    records: tuple[MemoryRecord, ...]


def create(path: Path, *, force: bool = False) -> None:
    """Make an empty run directory. An existing one is refused, or with `force` emptied of the files of a run; nothing else is touched."""
    try:
        if path.is_dir() and any(path.iterdir()):
            if not force:
                raise InputError(
                    f"{path} exists and is not empty", hint="choose another --output-dir, or add --force to replace the run in it"
                )
            if not (path / MANIFEST).is_file():
                raise InputError(f"{path} is not empty and holds no {MANIFEST}, so --force will not replace it")
            _empty(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {path}: {error.strerror}") from error


def _empty(path: Path) -> None:
    """Remove the files of a run and the folders of its cases, which `Case.label` names; the manifest last, so that it can be repeated."""
    for folder in path.glob("zero[0-3]-w*"):
        shutil.rmtree(folder)
    for name in (RECORDS, REPORT, LOSSES, QUALITY, MANIFEST):
        (path / name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises `InputError` when the folder is read-only or the disk is full; the old file stays."""
    temporary = None
    try:
        if path.exists() and not path.is_file():  # a device or a pipe (-o /dev/stdout) cannot be replaced by a rename
            path.write_bytes(content)
            return
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:50]}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass or plain value as JSON, atomically."""
    write_text(path, json_text(value) + "\n")


def command_line() -> tuple[str, ...]:
    """What was typed, as text that JSON can hold: bytes in file names that are no UTF-8 become visible escapes."""
    return tuple(argument.encode(errors="backslashreplace").decode() for argument in sys.argv)


def now() -> str:
    """The time as a manifest holds it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def save(run: Run) -> None:
    """Write the manifest and the records of a run into its folder."""
    write_json(run.path / RECORDS, document(run.records))
    write_json(run.path / MANIFEST, run.manifest)


def save_losses(run: Run) -> None:
    """Write the losses of all cases into its folder as CSV: case, step, loss (mean over the ranks)."""
    rows = ((r.case.label, s.step, s.loss) for r in run.records for s in r.steps if s.loss is not None)
    write_text(run.path / LOSSES, rows_as_csv(("case", "step", "loss"), rows))


def rows_as_csv(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV; `None` is empty."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows(rows)
    return table.getvalue()


def replace(run: Run, *, records: tuple[MemoryRecord, ...] | None = None, **changes: Any) -> Run:
    """The same run with other records and with changes to its manifest."""
    manifest = dataclasses.replace(run.manifest, **changes)
    return Run(run.path, manifest, run.records if records is None else records)


def load(path: Path) -> Run:
    """Read a run directory (or its `run.json`). Raises `InputError` naming the file and the field that is wrong."""
    folder = path.parent if path.name == MANIFEST else path
    manifest: Manifest = read(folder / MANIFEST, Manifest)
    return Run(folder, manifest, load_records(folder / RECORDS))


def load_records(path: Path) -> tuple[MemoryRecord, ...]:
    """The records of a JSON document, as every command writes it. Raises `InputError` naming the file and the field."""
    found: _Document = read(path, _Document)
    return found.records


def read(path: Path, kind: type[Any]) -> Any:
    """Read a JSON file into a dataclass, strictly. Raises `InputError` naming the file and the field."""
    import pydantic

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from error
    _check_version(path, text)
    try:
        return pydantic.TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise InputError(f"{path}: {where}: {first['msg']}") from error


def _check_version(path: Path, text: str) -> None:
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a complete JSON document ({str(error).splitlines()[0]})") from error
    version = head.get("schema_version") if isinstance(head, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version is {version!r}, this bf16prof reads {SCHEMA_VERSION}")
