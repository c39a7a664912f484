"""Plain JSON from a user's file: what is read here can be stored in a run's manifest and sent to ranks as it is.

A file may be anything: missing, endless, nested without end, with numbers and characters that JSON has no place for.
"""

from __future__ import annotations

import errno
import json
import math
import os
import select
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from bf16prof.errors import InputError

LARGEST_BYTES = 16 * 2**20
PATIENCE_S = 5.0
"""Seconds in which somebody has to begin to write to a named pipe."""
DEEPEST = 32
"""Levels of nesting; DeepSpeed's and Hugging Face's files have five or so."""


INFINITY = sys.float_info.max
"""What stands for `Infinity` where it is allowed: JSON has no such number, Python's reader (and so transformers) knows the word."""


def read_json_object(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises `InputError` naming the file and what is wrong with it.

    `infinite`: `Infinity` is read as `INFINITY`, and `NaN` as null.
    """
    try:
        content = read_up_to(LARGEST_BYTES, path)
    except ValueError as error:  # a path that cannot be one
        raise InputError(f"{path}: not valid JSON: {error}") from error
    return parse_json_object(content, str(path), infinite=infinite)


def read_up_to(limit: int, path: Path) -> bytes:
    """The content of a file of at most so many bytes. Raises `InputError` naming the file, `ValueError` for a path that cannot be one."""
    try:
        with open(path, "rb", opener=_opened) as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise InputError(f"cannot read {path}: larger than {limit >> 20} MiB")
    return content


def _opened(path: str, flags: int) -> int:
    """Open a file; a named pipe only if somebody writes to it soon, since a pipe that is not written to is waited for without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if Path(path).resolve().is_fifo() and not select.select([descriptor], [], [], PATIENCE_S)[0]:
        os.close(descriptor)
        raise OSError(errno.EAGAIN, "nobody writes to this pipe")
    os.set_blocking(descriptor, True)
    return descriptor


def parse_json_object(content: bytes, origin: str, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a file's content. Raises `InputError` naming the origin and what is wrong with it."""
    try:
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_CONSTANTS.get if infinite else None)
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {origin}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: not valid JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{origin}: expected a JSON object, got {type(found).__name__}")
    if wrong := problem(found):
        raise InputError(f"{origin}: {wrong}")
    return found


_CONSTANTS: dict[str, float | None] = {"Infinity": INFINITY, "-Infinity": -INFINITY, "NaN": None}


def dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted names; a table without values has none."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def checked(value: dict[str, Any]) -> dict[str, Any]:
    """The table itself; pydantic's error when it holds something that JSON cannot."""
    if wrong := problem(value):
        raise PydanticCustomError("plain", "expected what JSON can hold ({wrong})", {"wrong": wrong})
    return value


def problem(value: object, key: str = "", depth: int = 0) -> str | None:
    """What in nested tables and lists JSON cannot hold, with its dotted key; `None` if nothing."""
    if depth > DEEPEST:
        return f"nested more than {DEEPEST} deep"
    if isinstance(value, dict):
        return _first(problem(name, f"{key}.{name}", depth) or problem(item, f"{key}.{name}", depth + 1) for name, item in value.items())
    if isinstance(value, list):
        return _first(problem(item, f"{key}.{index}", depth + 1) for index, item in enumerate(value))
    if isinstance(value, str):
        return None if value.isascii() or _is_text(value) else f"{_shown(key)}: no Unicode text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{_shown(key)}: {value} is no number of JSON"
    return None if value is None or isinstance(value, int | float) else f"{_shown(key)}: {type(value).__name__} is no type of JSON"


def _first(problems: Iterable[str | None]) -> str | None:
    return next((found for found in problems if found), None)


def _shown(key: str) -> str:
    return key.removeprefix(".").encode(errors="backslashreplace").decode()[:120]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. DeepSpeed, too, refuses a key that is there twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)[:60]!r} is there twice")
    return table
