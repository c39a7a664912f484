"""`bf16prof schema`: the JSON Schema of every document that commands print and run directories
keep, generated from the code.

The generated files ship in `bf16prof/schemas/` (`make schemas` writes them; a test holds that they
are current).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from bf16prof.cases import Refusal
from bf16prof.documents import SCHEMA_VERSION
from bf16prof.explanations import Explanation
from bf16prof.plans import Outlook, Plan, Room
from bf16prof.profiles.names import unknown
from bf16prof.reconcile import Comparison
from bf16prof.records import Case, MemoryRecord
from bf16prof.runs import CaseStatus, Manifest
from bf16prof.vocabulary import Bytes

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclasses.dataclass(frozen=True)
class ResolvedSetting:
    """One resolved setting: its value, and where it comes from."""

    value: Any
    origin: str


@dataclasses.dataclass(frozen=True)
class TextbookAccount:
    """What rules of thumb say of a case, in bytes, by the name of the rule."""

    case: Case
    bytes: dict[str, int]


_SETTINGS = {"settings": dict[str, ResolvedSetting]}
_COMPARED = {"comparisons": tuple[Comparison, ...]}

DOCUMENTS: Mapping[str, Mapping[str, Any]] = {
    "estimate": {**_SETTINGS, "refused": tuple[Refusal, ...], "textbook": tuple[TextbookAccount, ...]},
    "simulate": {**_SETTINGS, "refused": tuple[Refusal, ...]},
    "plan": {**_SETTINGS, "asked": str, "plans": tuple[Plan, ...], "outlooks": "outlooks"},
    "measure": {**_SETTINGS, **_COMPARED, "run": str, "cases": tuple[CaseStatus, ...]},
    "import": {**_SETTINGS, **_COMPARED, "run": str},
    "explain": {**_SETTINGS, "explanation": Explanation},
    "report": _COMPARED,
    "records.json": {},
}
"""What each document holds beside `schema_version` and `records`."""


def names() -> list[str]:
    """The documents that have a schema."""
    return [*DOCUMENTS, "run.json"]


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of a document. Raises `InputError` naming the known ones."""
    import pydantic

    if name not in names():
        raise unknown("document", name, names())
    if name == "run.json":
        found = pydantic.TypeAdapter(Manifest).json_schema(mode="serialization")
    else:
        more = {key: (_outlooks() if kind == "outlooks" else kind, ...) for key, kind in DOCUMENTS[name].items()}
        fields: dict[str, Any] = {"schema_version": (int, ...), "records": (tuple[MemoryRecord, ...], ...), **more}
        document: Any = pydantic.create_model(f"{name} document", **fields)
        found = document.model_json_schema(mode="serialization")
    found["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    title = f"bf16prof {name}" if name.endswith(".json") else f"bf16prof {name} --json"
    return {"$schema": DIALECT, **found, "title": title}


def _outlooks() -> Any:
    """Outlooks as `plan` prints them: their plans stand in a list of their own, and the room says
    its bytes."""
    import pydantic

    room: Any = pydantic.create_model("PrintedRoom", **_fields(Room), bytes=(Bytes, ...))
    fields = {name: kind for name, kind in _fields(Outlook).items() if name != "plans"} | {"room": (room, ...)}
    return tuple[pydantic.create_model("PrintedOutlook", **fields), ...]  # type: ignore[misc]


def _fields(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: (hints[field.name], ...) for field in dataclasses.fields(kind)}


def schema(
    name: Annotated[
        str, typer.Argument(metavar="[DOCUMENT]", help="A command's name, run.json or records.json; all names if left out.")
    ] = "",
) -> None:
    """Print the JSON Schema of what a command prints with --json, or of a run directory's files."""
    typer.echo(json_schema_text(name) if name else "\n".join(names()), nl=not name)


def json_schema_text(name: str) -> str:
    """The schema as it ships."""
    return json.dumps(schema_of(name), indent=1, sort_keys=True) + "\n"


def write_all(folder: Path) -> None:
    """Write every schema into a folder."""
    folder.mkdir(exist_ok=True)
    for name in names():
        (folder / f"{name.removesuffix('.json')}.json").write_text(json_schema_text(name))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
