"""The JSON documents in which commands print records and run directories keep them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

from bf16prof.records import MemoryRecord

SCHEMA_VERSION = 1

_quoted = json.encoder.encode_basestring_ascii
_CONSTANTS = {None: "null", True: "true", False: "false"}


def as_json(value: Any) -> Any:
    """A record (or any part of one) as plain dicts, lists, strings and numbers, ready for
    `json.dumps`."""
    if (names := _fields(type(value))) is not None:
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def json_text(value: Any) -> str:
    """A record, or anything that `as_json` takes, as a JSON text for people as well: indented,
    lists of numbers on one line.

    Raises `ValueError` for numbers that JSON does not have (NaN, infinities). Written in one pass:
    with an indent, `json.dumps` does not use its fast encoder, and a grid of some hundred records
    would take longer to be written than to be predicted.
    """
    parts: list[str] = []
    _write(value, "\n", parts.append)
    return "".join(parts)


def _write(value: Any, line: str, out: Callable[[str], object]) -> None:
    """Write a value; `line` ends a line and indents the next."""
    if isinstance(value, str):
        out(_quoted(value))
    elif isinstance(value, int | float) or value is None:
        out(_scalar(value))
    elif (names := _fields(type(value))) is not None:
        _write_table(((name, getattr(value, name)) for name in names), line, out)
    elif isinstance(value, dict):
        _write_table(((str(key), item) for key, item in value.items()), line, out)
    elif isinstance(value, list | tuple):
        _write_list(value, line, out)
    else:
        raise TypeError(f"JSON has no {type(value).__name__}")


def _scalar(value: float | None) -> str:
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Out of range float values are not JSON compliant: {value}")
    return float.__repr__(value) if isinstance(value, float) else int.__repr__(value)


def _write_table(items: Iterable[tuple[str, Any]], line: str, out: Callable[[str], object]) -> None:
    inner = f"{line}  "
    begin = "{" + inner
    for key, item in items:
        out(f"{begin}{_quoted(key)}: ")
        _write(item, inner, out)
        begin = f",{inner}"
    out("{}" if begin[0] == "{" else f"{line}}}")


def _write_list(items: list[Any] | tuple[Any, ...], line: str, out: Callable[[str], object]) -> None:
    if all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        out(f"[{', '.join(map(_scalar, items))}]")
        return
    inner = f"{line}  "
    begin = "[" + inner
    for item in items:
        out(begin)
        _write(item, inner, out)
        begin = f",{inner}"
    out(f"{line}]")


_FIELDS: dict[type, tuple[str, ...] | None] = {}


def _fields(kind: type) -> tuple[str, ...] | None:
    """The names of a dataclass's fields; `None` of anything else. Looked up once for each class."""
    if kind not in _FIELDS:
        _FIELDS[kind] = tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None
    return _FIELDS[kind]


def raw_document(records: list[MemoryRecord] | tuple[MemoryRecord, ...], **more: Any) -> dict[str, Any]:
    """What `document` has, not made plain yet: for `json_text`, which does it while it writes."""
    return {"schema_version": SCHEMA_VERSION, "records": list(records), **more}


def document(records: list[MemoryRecord] | tuple[MemoryRecord, ...], **more: Any) -> dict[str, Any]:
    """The JSON document that every command prints: the schema version, the records, and what else
    the command adds."""
    found: dict[str, Any] = as_json(raw_document(records, **more))
    return found
