"""Plain JSON from a user's file: what is read here can be stored in a run's manifest and sent to
ranks as it is.

A file may be anything: nested without end, with numbers and characters that JSON has no place for
(`files.py`: missing, without end).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from bf16prof.errors import InputError
from bf16prof.files import LARGEST_SETTINGS, read_up_to

LARGEST_LENIENT_BYTES = 2**20
"""Of a file that is read by a slow parser: JSON with comments, YAML."""
DEEPEST = 32
"""Levels of nesting; DeepSpeed's and Hugging Face's files have five or so."""


LARGEST = 2**63
"""Whole numbers are below it: what reads our JSON has 64 bits for one."""

INFINITY = sys.float_info.max
"""What stands for `Infinity` where it is allowed: JSON has no such number, Python's reader (and so
transformers) knows the word."""


def read_json_object(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises `InputError` naming the file and what is wrong with it.

    `infinite`: `Infinity` is read as `INFINITY`, and `NaN` as null.
    """
    return parse_json_object(read_up_to(LARGEST_SETTINGS, path, pipes=True), str(path), infinite=infinite)


def read_hjson_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may hold comments and trailing commas, as DeepSpeed reads one
    (`runtime/config.py`: hjson).

    What plain JSON can say is read as plain JSON. Raises `InputError` naming the file and what is
    wrong with it.
    """

    def parse(text: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError:
            return _parse_hjson(text)

    return _object(read_up_to(LARGEST_SETTINGS, path, pipes=True), str(path), "JSON", parse)


def read_yaml_object(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, of which JSON is a part; its keys are strings. Raises
    `InputError` as the other readers do."""
    return _object(read_up_to(LARGEST_SETTINGS, path, pipes=True), str(path), "YAML", _parse_yaml)


def _parse_hjson(text: str) -> Any:
    import hjson

    _require_small(text)
    if not text.strip():
        raise ValueError("it is empty")
    try:
        return hjson.loads(text, object_pairs_hook=_unique)
    except OverflowError as error:  # it makes whole numbers of floats, and a float may be infinite
        raise ValueError(f"a number that is too large: {error}") from error


def _parse_yaml(text: str) -> Any:
    import yaml

    _require_small(text)

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Of plain values only, each key once."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few, one inside another, stand for more than anybody can walk through
                raise ValueError("aliases (*name) are not read; write the value again")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = [(str(self.construct_object(k, deep=True)), self.construct_object(v, deep=True)) for k, v in node.value]
            return _unique(list({repr(pair): pair for pair in pairs}.values()))  # the same value twice does no harm

        def construct_yaml_map(self, node: Any) -> Any:
            return self.construct_mapping(node)

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_yaml_map)
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


_EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""`1e-5`, which YAML 1.1 takes for text, and everybody who writes it for a number."""


def _require_small(text: str) -> None:
    if len(text) > LARGEST_LENIENT_BYTES:
        raise ValueError(f"larger than {LARGEST_LENIENT_BYTES >> 20} MiB, which only plain JSON may be")


def parse_json_object(content: bytes, origin: str, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a file's content. Raises `InputError` naming the origin and what is wrong with
    it."""
    constants = _CONSTANTS.get if infinite else None
    return _object(content, origin, "JSON", lambda text: json.loads(text, object_pairs_hook=_unique, parse_constant=constants))


def _object(content: bytes, origin: str, what: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a parser makes of a file's content, if it is an object of plain values."""
    try:
        found = parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {origin}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: not valid {what}: {str(error).splitlines()[0]:.200}") from error
    if not isinstance(found, dict):
        raise InputError(f"{origin}: expected a {what} object, got {type(found).__name__}")
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
    if isinstance(value, int | float):
        wrong = _wrong_with_number(value)
        return wrong and f"{_shown(key)}: {wrong}"
    return None if value is None else f"{_shown(key)}: {type(value).__name__} is no type of JSON"


def _wrong_with_number(value: float) -> str | None:
    if isinstance(value, int):
        return None if -LARGEST < value < LARGEST else "a whole number beyond 2^63"
    return None if math.isfinite(value) else f"{value} is no number of JSON"


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
