"""A run directory: `run.json` (the manifest), `records.json`, one folder per case with one file per
rank, `loss.csv`, `report.html`, and `quality.csv` where updates were watched. While it is written,
`LOCK` says by whom (`claims.py`).

Files are written atomically (`files.py`). Files are read strictly: whatever is truncated, of
another schema version, or not of the expected type is an `InputError` that names the file and the
field.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from bf16prof.documents import SCHEMA_VERSION, raw_document
from bf16prof.errors import InputError
from bf16prof.files import LARGEST_DOCUMENT, read_text, write_json, write_text
from bf16prof.locks import is_held
from bf16prof.profiles.plain import problem
from bf16prof.profiles.secrets import command_without_secrets
from bf16prof.records import Case, MemoryRecord
from bf16prof.vocabulary import STRICT, Device

MANIFEST = "run.json"
RECORDS = "records.json"
REPORT = "report.html"
LOSSES = "loss.csv"
QUALITY = "quality.csv"
LOCK = ".bf16prof.lock"
"""Held by the process that writes the run, for as long as it lives."""
RESERVE = ".bf16prof.reserve"
"""Disk space that is set aside while a run goes on, so that its end can be written on a disk that
is full by then."""
ALIVE = ".bf16prof.alive"
"""On several nodes: the process that writes the run counts up in it, so that nothing on other nodes
outlives it."""
OWN_FILES = frozenset((MANIFEST, RECORDS, REPORT, LOSSES, QUALITY, LOCK, RESERVE, ALIVE))
"""All files that we write into a run directory itself."""

SPEC = "spec.json"
EXITS = "exits.json"
LAUNCHER_LOG = "launcher.log"
SCRIPT_FOLDER = "script"
"""Where the ranks of a user's own script write, in the place of the folder of a case: which case it
is they know only in the end."""
SCRIPT = "script.json"
"""In that folder: what its ranks are told, where we have started them."""
LAYOUT = "layout.json"
STOP = "stop"
"""On several nodes: agents end their ranks when it is there."""
CASE_FILES = frozenset((SPEC, EXITS, LAUNCHER_LOG, LAYOUT, STOP, SCRIPT))
"""All files that we write into the folder of a case, beside those of its ranks and nodes."""

PROFILE_TABLES = ("model", "workload", "optimizer", "deepspeed")
"""The tables of a profile (`profiles/schema.py`), as far as a manifest has them."""

_RANK_FILE = re.compile(r"rank(0|[1-9]\d{0,8})\.(json|log|where)")
_NODE_FILE = re.compile(r"(node(0|[1-9]\d{0,8})\.(json|log)|exits[1-9]\d{0,8}\.json)")


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its result."""
    return folder / f"rank{rank}.json"


def rank_log(folder: Path, rank: int) -> Path:
    """Where all that a rank prints goes."""
    return folder / f"rank{rank}.log"


def where_file(folder: Path, rank: int) -> Path:
    """Where a rank says what it is about, while it runs."""
    return folder / f"rank{rank}.where"


def node_file(folder: Path, node: int) -> Path:
    """Where the agent of a node reports."""
    return folder / f"node{node}.json"


def node_log(folder: Path, node: int) -> Path:
    """Where all that an agent prints goes."""
    return folder / f"node{node}.log"


def exits_file(folder: Path, node: int) -> Path:
    """Where an agent writes which of its ranks ended how."""
    return folder / (f"exits{node}.json" if node else EXITS)


def is_case_file(name: str, world_size: int | None) -> bool:
    """Whether we write a file of this name into the folder of a case of that many ranks (`None`: of
    any number)."""
    rank = _RANK_FILE.fullmatch(name)
    is_rank = rank is not None and (world_size is None or int(rank[1]) < world_size)
    return name in CASE_FILES or is_rank or _NODE_FILE.fullmatch(name) is not None


class Status(StrEnum):
    """How far a run, or one case of it, has come. Anything but `finished` means that numbers are
    missing or partial.

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
    """One case of a run: its status, one line on what went wrong, and the end of the failing rank's
    log."""

    __pydantic_config__ = STRICT

    case: Case
    status: Status
    message: str = ""
    log_tail: str = ""


@dataclass(frozen=True)
class Node:
    """One of several hosts of a run."""

    __pydantic_config__ = STRICT

    node: int
    host: str
    hardware: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a run was: who ran what, where, and how it ended. Times are ISO 8601 in UTC.

    `origins`: where each value of the profile comes from, by its dotted key; `default` where a key
    is missing. `nodes`: the hosts, where there are several; `hardware` is that of the one where the
    run was started. `joined`: a digest of the files of a script's ranks that the records were made
    from.
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
    nodes: tuple[Node, ...] = ()
    joined: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if wrong := problem(self.profile, "profile"):
            raise ValueError(wrong)
        for table in PROFILE_TABLES:
            if not isinstance(self.profile.get(table, {}), dict):
                raise ValueError(f"profile.{table}: expected a table, got {self.profile[table]!r:.60}")


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


def command_line() -> tuple[str, ...]:
    """What was typed, without secrets, as text that JSON can hold: bytes in file names that are no
    UTF-8 become visible escapes."""
    return command_without_secrets([argument.encode(errors="backslashreplace").decode() for argument in sys.argv])


def now() -> str:
    """The time as a manifest holds it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def save(run: Run) -> None:
    """Write the manifest and the records of a run into its folder."""
    save_records(run)
    save_manifest(run)


def save_records(run: Run) -> None:
    """Write the records of a run into its folder."""
    write_json(run.path / RECORDS, raw_document(run.records))


def save_manifest(run: Run) -> None:
    """Write the manifest of a run into its folder."""
    write_json(run.path / MANIFEST, run.manifest)


def save_losses(run: Run) -> None:
    """Write the losses of all cases into its folder as CSV: case, step, loss (mean over the
    ranks)."""
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
    """Read a run directory (or its `run.json`). Raises `InputError` naming the file and the field
    that is wrong.

    A run that says it is running, and whose process is gone, was interrupted: its lock is nobody's.
    """
    folder = path.parent if path.name == MANIFEST else path
    manifest: Manifest = read(folder / MANIFEST, Manifest)
    if manifest.status is Status.RUNNING and not is_held(folder / LOCK):
        manifest = read(folder / MANIFEST, Manifest)  # it may have ended since
        manifest = interrupted(manifest) if manifest.status is Status.RUNNING else manifest
    return Run(folder, manifest, load_records(folder / RECORDS))


def interrupted(manifest: Manifest, status: Status = Status.INTERRUPTED) -> Manifest:
    """The manifest of a run that ended before its time, with that status; cases that were not over
    are interrupted."""
    open_ = (Status.RUNNING, Status.PLANNED)
    cases = tuple(dataclasses.replace(c, status=Status.INTERRUPTED) if c.status in open_ else c for c in manifest.cases)
    return dataclasses.replace(manifest, status=status, cases=cases)


def load_records(path: Path) -> tuple[MemoryRecord, ...]:
    """The records of a JSON document, as every command writes it. Raises `InputError` naming the
    file and the field."""
    found: _Document = read(path, _Document)
    return found.records


def read(path: Path, kind: type[Any]) -> Any:
    """Read a JSON file into a dataclass, strictly. Raises `InputError` naming the file and the
    field."""
    import pydantic

    text = read_text(LARGEST_DOCUMENT, path)
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
