"""Read profiles: presets that ship with the package, or a user's own TOML file, with overrides laid over them.

Every value remembers where it came from (`Resolved.origins`), so that `profiles show --resolved` can say it.
"""

from __future__ import annotations

import errno
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from bf16prof.errors import InputError
from bf16prof.profiles.schema import Profile, ZeroSettings

REASONS = {
    "deepspeed.memory_breakdown": "it resets torch's peak counter on rank 0 (see_memory_usage), so no peak could be measured",
    "deepspeed.zero_optimization.stage": "the ZeRO stage belongs to the case: use --zero",
    "deepspeed.fp16": "the precision belongs to the recipe: use --recipe",
    "deepspeed.torch_autocast": "the precision belongs to the recipe: use --recipe",
    "deepspeed.bf16.enabled": "the precision belongs to the recipe: use --recipe",
    "deepspeed.optimizer": "the optimizer has a table of its own: [optimizer]",
}


@dataclass(frozen=True)
class Override:
    """One value that the user set over the profile: a dotted key, the value, and the flag or variable it came from."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Resolved:
    """A valid profile and, for each of its leaf keys, where the value came from (`default` if nobody set it)."""

    profile: Profile
    origins: dict[str, str]


def preset_names() -> list[str]:
    """The names of the profiles that ship with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _presets().iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str, overrides: Sequence[Override] = ()) -> Resolved:
    """A preset by name, or a profile file by path, with the overrides laid over it.

    Raises `InputError` naming the file, the key and what was expected.
    """
    label, origin, text = _read(name)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, a number of more digits than Python reads, or nested without end
        raise InputError(f"{origin}: not valid TOML: {error}") from error
    table.setdefault("name", label)
    origins = dict.fromkeys(map(_documented, leaves(table)), origin)
    for override in overrides:
        _lay(table, override)
        origins = {key: o for key, o in origins.items() if not key.startswith(f"{override.key}.")}
        origins |= dict.fromkeys(map(_documented, leaves(_nest(override))), override.origin)
    try:
        profile = Profile.model_validate(table)
    except ValidationError as error:
        raise InputError(explain(error, origins, origin)) from error
    return Resolved(profile, origins)


def parse_set(text: str, origin: str = "--set") -> Override:
    """`section.key=value` as an override; the value is read as TOML (`true`, `3`, `0.5`, `[1, 2]`), else as a string."""
    key, sign, value = text.partition("=")
    if not sign or not all(part.isidentifier() for part in key.strip().split(".")):
        raise InputError(f"{origin} {text!r}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    return Override(key.strip(), parsed, origin)


def leaves(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all values of nested tables."""
    names = []
    for key, value in table.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return names


def _documented(key: str) -> str:
    """The key as DeepSpeed documents it, where a short name stands for it."""
    table, _, last = key.rpartition(".")
    field = ZeroSettings.model_fields.get(last) if table == "deepspeed.zero_optimization" else None
    return f"{table}.{field.alias}" if field and field.alias else key


def explain(error: ValidationError, origins: Mapping[str, str], default_origin: str) -> str:
    """One line for a validation error: where the value came from, its key, and what was expected."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    documented = _documented(key)
    origin = next((o for k, o in origins.items() if k == documented or k.startswith(documented + ".")), default_origin)
    if first["type"] == "extra_forbidden":
        reason = REASONS.get(key)
        return (
            f"{origin}: {key}: refused: {reason}" if reason else f"{origin}: {key}: unknown key; expected one of {_expected(first['loc'])}"
        )
    if first["type"] == "missing":
        return f"{origin}: {key}: missing"
    return f"{origin}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {_shown(first['input'])}"


def _shown(value: object) -> str:
    try:
        return repr(str(value)[:60])
    except ValueError:  # Python prints no integer of more than 4,300 digits; TOML can hold one in hexadecimal
        return "a number of thousands of digits"


def _expected(location: Sequence[int | str]) -> str:
    model: type[BaseModel] = Profile
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return ", ".join(field.alias or name for name, field in model.model_fields.items())


def _presets() -> Any:
    return resources.files("bf16prof.profiles") / "presets"


def _read(name: str) -> tuple[str, str, str]:
    """The label, the origin and the text of a profile given by preset name or path."""
    if name in preset_names():
        return name, f"preset {name}", (_presets() / f"{name}.toml").read_text(encoding="utf-8")
    path = Path(name)
    try:
        return path.stem, str(path), path.read_text(encoding="utf-8")
    except OSError as error:
        if path.suffix != ".toml" and error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
            hint = "presets: " + ", ".join(preset_names()) + "; or the path of a .toml file"
            raise InputError(f"unknown profile {name!r}", hint=hint) from None
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: not UTF-8 text") from error


def _nest(override: Override) -> dict[str, Any]:
    nested: Any = override.value
    for part in reversed(override.key.split(".")):
        nested = {part: nested}
    return dict(nested)


def _lay(table: dict[str, Any], override: Override) -> None:
    """Put the override's value into the nested table; DeepSpeed's long and short names of a key replace each other."""
    *path, last = override.key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"{override.origin} {override.key}: {part} is not a table")
    for alias in {f"stage3_{last}", last.removeprefix("stage3_")} - {last}:
        table.pop(alias, None)
    table[last] = override.value
