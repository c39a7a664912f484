"""Read profiles: presets that ship with the package, or a user's own TOML file, with overrides laid
over them.

Every value remembers where it came from (`Resolved.origins`), so that every answer can say it; what
nobody said is assumed (`assumed.py`).
"""

from __future__ import annotations

import errno
import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bf16prof.errors import InputError
from bf16prof.files import LARGEST_SETTINGS, read_text
from bf16prof.profiles.assumed import assumed_words, fill_in
from bf16prof.profiles.explain import documented, explain, origin_of
from bf16prof.profiles.models import KINDS, HuggingFaceSettings
from bf16prof.profiles.names import named
from bf16prof.profiles.plain import dotted, parse_json_object, read_json_object
from bf16prof.profiles.safetensors import read_shapes
from bf16prof.profiles.schema import Profile
from bf16prof.profiles.shipped import preset_files, preset_ids, shipped_text
from bf16prof.profiles.sizes import wrong_size


@dataclass(frozen=True)
class Override:
    """One value that the user set over the profile: a dotted key, the value, and the flag or
    variable it came from."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Resolved:
    """A valid profile and, for each of its leaf keys, where the value came from (`default` if
    nobody set it)."""

    profile: Profile
    origins: dict[str, str]

    @property
    def assumed(self) -> tuple[str, ...]:
        """What nobody said and was assumed, in a word each."""
        return assumed_words(self.origins)


def preset_names() -> list[str]:
    """The names of the profiles that ship with the package."""
    return list(preset_files())


def load_profile(name: str | None, overrides: Sequence[Override] = ()) -> Resolved:
    """A preset by name, or a profile file by path, with the overrides laid over it; what is left
    open is assumed.

    Without a name nothing lies under the overrides, which then have to name a model. Raises
    `InputError` naming the file, the key and what was expected.
    """
    source = _read(name) if name is not None else _Source("", "the model", "", Path())
    table = _parsed(source)
    table.setdefault("name", source.label)
    origins = dict.fromkeys(map(documented, dotted(table)), source.origin) | _read_files(table, source.folder)
    for override in overrides:
        replaced = _lay(table, override)
        origins = {key: o for key, o in origins.items() if not key.startswith(f"{replaced}.")}
        origins |= dict.fromkeys(map(documented, dotted(_nest(override))), override.origin) | _read_files(table, Path())
    origins |= fill_in(table, origins)
    try:
        profile = Profile.model_validate(table)
    except ValidationError as error:
        raise InputError(explain(error, origins, source.origin)) from error
    _require_sizes(profile, origins, source.origin)
    return Resolved(profile, _of_what_is_there(origins, profile))


def _require_sizes(profile: Profile, origins: Mapping[str, str], otherwise: str) -> None:
    """Raise `InputError` for a size of a Hugging Face configuration that no model can have."""
    if isinstance(profile.model, HuggingFaceSettings) and (found := wrong_size(profile.model.hf_config)):
        key, value = f"model.hf_config.{found[0]}", found[1]
        raise InputError(f"{origin_of(key, origins, otherwise)}: {key}: expected a whole number above 0, got {value!r:.60}")


def _of_what_is_there(origins: dict[str, str], profile: Profile) -> dict[str, str]:
    """The origins without those of texts that were not taken over (`secrets.py`), whose keys may be
    somebody's words as well."""
    config = profile.model.hf_config if isinstance(profile.model, HuggingFaceSettings) else {}
    tables = {"model.hf_config.": config, "deepspeed.more.": profile.deepspeed.more}
    there = {key for prefix, table in tables.items() for key in dotted(table, prefix)}
    return {key: origin for key, origin in origins.items() if key in there or not key.startswith(tuple(tables))}


def parse_set(text: str, origin: str = "--set") -> Override:
    """`section.key=value` as an override; the value is read as TOML (`true`, `3`, `0.5`, `[1, 2]`),
    else as a string."""
    key, sign, value = text.partition("=")
    if not sign or not all(part.isidentifier() for part in key.strip().split(".")):
        raise InputError(f"{origin} {text!r}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    return Override(key.strip(), parsed, origin)


@dataclass(frozen=True)
class _Source:
    """A profile as it is stored: what it is called, where it came from, its text, where its paths
    start, and whether it is JSON."""

    label: str
    origin: str
    text: str
    folder: Path
    is_json: bool = False


def _read(name: str) -> _Source:
    """The text of a profile given by the name of a preset, or by its path. A file wins over a
    preset that only looks like its name."""
    path = Path(name)
    if name in preset_files():
        return _preset(name)
    if path.suffix == ".toml" or _exists(path):
        name = path.stem.encode(errors="backslashreplace").decode()  # a file's name need not be text; a profile's is
        return _Source(name, str(path), read_text(LARGEST_SETTINGS, path, pipes=True), path.parent)
    ids = preset_ids()
    return _preset(
        named("profile", name, {preset: preset for preset in ids}, lambda preset: ids[preset], more="or the path of a .toml file")
    )


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, ValueError):
        return False
    except OSError as error:
        return error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG)
    return True


def _preset(name: str) -> _Source:
    return _Source(name, f"preset {name}", shipped_text(preset_files()[name]), Path(), is_json=preset_files()[name].endswith(".json"))


def preset_model(name: str) -> dict[str, Any]:
    """The `[model]` table of a preset."""
    found: dict[str, Any] = _parsed(_preset(name))["model"]
    return found


def _parsed(source: _Source) -> dict[str, Any]:
    if source.is_json:
        return parse_json_object(source.text.encode(), source.origin)
    try:
        return tomllib.loads(source.text)
    except (ValueError, RecursionError) as error:  # malformed, a number of more digits than Python reads, or nested without end
        raise InputError(f"{source.origin}: not valid TOML: {error}") from error


FILES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hf_config": functools.partial(read_json_object, infinite=True),
    "safetensors": read_shapes,
}
"""Keys of a model that name a file, whose content takes the place of its path."""


def _read_files(table: dict[str, Any], folder: Path) -> dict[str, str]:
    """Put the contents of the files that the model and `peft` name in their place; their keys, and
    which file they came from."""
    model = table.get("model")
    origins: dict[str, str] = {}
    for key, content in FILES.items():
        if isinstance(model, dict) and isinstance(model.get(key), str):
            path = folder / model[key]
            model[key] = content(path)
            origins |= dict.fromkeys([f"model.{key}", *dotted(model[key], f"model.{key}.")], str(path))
    if isinstance(table.get("peft"), str):
        path = folder / table["peft"]
        table["peft"] = read_json_object(path)
        origins |= dict.fromkeys(["peft", *dotted(table["peft"], "peft.")], str(path))
    return origins


def _nest(override: Override) -> dict[str, Any]:
    nested: Any = override.value
    for part in reversed(override.key.split(".")):
        nested = {part: nested}
    return dict(nested)


def _lay(table: dict[str, Any], override: Override) -> str:
    """Put the override's value into the nested table; the key whose whole content it has replaced.

    DeepSpeed's long and short names of a key replace each other, a key that names another kind of
    model makes a new `[model]` table, and another Hugging Face configuration is not the one that a
    list of parameters belongs to.
    """
    *path, last = override.key.split(".")
    if path == ["model"] and last in KINDS and isinstance(table.get("model"), dict) and last not in table["model"]:
        table["model"] = {last: override.value}
        return "model"
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"{override.origin} {override.key}: {part} is not a table")
    for alias in {f"stage3_{last}", last.removeprefix("stage3_")} - {last}:
        table.pop(alias, None)
    if override.key == "model.hf_config":
        table.pop("safetensors", None)
    table[last] = override.value
    return override.key
