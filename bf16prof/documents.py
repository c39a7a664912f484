"""The JSON documents in which commands print records and run directories keep them."""

from __future__ import annotations

import dataclasses
import json
import re
from enum import StrEnum
from typing import Any

from bf16prof.records import MemoryRecord

SCHEMA_VERSION = 1

_NUMBERS = re.compile(r"\[\n\s*[-+.eE0-9]+(?:,\n\s*[-+.eE0-9]+)*\n\s*\]")


def as_json(value: Any) -> Any:
    """A record (or any part of one) as plain dicts, lists, strings and numbers, ready for `json.dumps`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def json_text(value: Any) -> str:
    """A record, or anything that `as_json` takes, as a JSON text for people as well: indented, lists of numbers on one line.

    Raises `ValueError` for numbers that JSON does not have (NaN, infinities).
    """
    text = json.dumps(as_json(value), indent=2, allow_nan=False)
    return _NUMBERS.sub(lambda numbers: " ".join(numbers[0].split()).replace("[ ", "[").replace(" ]", "]"), text)


def document(records: list[MemoryRecord] | tuple[MemoryRecord, ...], **more: Any) -> dict[str, Any]:
    """The JSON document that every command prints: the schema version, the records, and what else the command adds."""
    return {"schema_version": SCHEMA_VERSION, "records": as_json(list(records)), **{k: as_json(v) for k, v in more.items()}}
