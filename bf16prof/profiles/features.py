"""What becomes of each key of DeepSpeed's JSON (`features.toml`): read, passed on, left out, or
refused where it is on.

The table decides for every command alike; what is switched off is no feature.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bf16prof.profiles.schema import ZeroSettings
from bf16prof.profiles.shipped import shipped_table

AUTO = "auto"
"""The Hugging Face Trainer's word for a value that it fills in."""


class Fate(StrEnum):
    """What becomes of a key that is on; see `features.toml`."""

    READ = "read"
    PASSED = "passed"
    LEFT_OUT = "left-out"
    RUN = "run"
    REFUSED = "refused"


@dataclass(frozen=True)
class Feature:
    """One key of DeepSpeed's JSON; `features.toml` says what each field means."""

    key: str
    fate: Fate
    why: str = ""
    off: tuple[Any, ...] = (False,)
    switch: str = ""
    on_if_present: bool = False
    any_enabled: bool = False
    within: str = ""
    removed: bool = False
    closed: bool = False
    free: bool = False
    note: str = ""

    @property
    def may_hold_anything(self) -> bool:
        """Whether no byte depends on the value."""
        return self.free or self.fate in (Fate.PASSED, Fate.LEFT_OUT)

    def is_on(self, value: object) -> bool:
        """Whether this value of the key switches something on. `auto` is nothing that somebody
        switched on."""
        if value is None or value == AUTO:
            return False
        if isinstance(value, Mapping):
            if self.any_enabled and _any_enabled(value):
                return True
            return self.is_on_by(value.get(self.switch)) if self.switch else self.on_if_present or (bool(value) and not self.any_enabled)
        return self.is_on_by(value)

    def is_on_by(self, value: object) -> bool:
        """The same of the value of the switch."""
        said = value.lower() == "true" if isinstance(value, str) and value.lower() in ("true", "false") else value
        if said is None or said == AUTO or any(said == off and type(said) is type(off) for off in self.off):
            return False
        return bool(said) or True in self.off  # false is something that is on where true is as usual


def _any_enabled(table: Mapping[str, Any]) -> bool:
    return any(value is True if key == "enabled" else isinstance(value, Mapping) and _any_enabled(value) for key, value in table.items())


@functools.cache
def features() -> dict[str, Feature]:
    """Every key by its dotted name."""
    return {key: _feature(key, row) for key, row in shipped_table("features.toml").items()}


def _feature(key: str, row: Mapping[str, Any]) -> Feature:
    feature = Feature(key, **{**row, "fate": Fate(row["fate"]), "off": tuple(row.get("off", (False,)))})
    assert (feature.fate is Fate.REFUSED) == bool(feature.why), key
    return feature


def documented_key(key: str) -> str:
    """The dotted key as DeepSpeed documents it, where a short name stands for it
    (`prefetch_bucket_size`)."""
    table, _, last = key.rpartition(".")
    known = ZeroSettings.model_fields.get(last) if table == "zero_optimization" else None
    long = f"stage3_{last}" if table == "zero_optimization" and f"{table}.stage3_{last}" in features() else last
    return f"{table}.{known.alias if known and known.alias else long}".removeprefix(".")


def find(key: str) -> Feature | None:
    """The row of a dotted key; else that of the table it lies in, if no other key of that table is
    listed."""
    known = features()
    if (name := documented_key(key)) in known:
        return known[name]
    table = key.rpartition(".")[0]
    if not table:
        return None
    above = find(table)
    return above if above is not None and above.fate is not Fate.READ else None


@dataclass
class Sorted:
    """A DeepSpeed JSON sorted by the table: what is kept of it, and what is to be said of the
    rest."""

    kept: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    """`key: reason`."""
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Keys that DeepSpeed does not know and ignores."""


def sort_keys(content: Mapping[str, Any]) -> Sorted:
    """Sort the content of a DeepSpeed JSON: what is off, and what nothing depends on and holds no
    value, is left out."""
    found = Sorted()
    found.kept = _sorted(content, "", content, found)
    if found.unknown:
        keys = ", ".join(f"{key:.80}" for key in found.unknown)
        found.notes.append(f"{keys}: DeepSpeed does not know {'it and ignores it' if len(found.unknown) == 1 else 'them and ignores them'}")
    return found


def refusals(config: Mapping[str, Any]) -> list[str]:
    """Why no command takes this configuration, as `key: reason`."""
    return sort_keys(config).refused


def with_effect(more: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys of a part of a configuration that the closed form does not know and that may
    change what is held."""
    for key, feature, value in _walk(more, ""):
        if feature is not None and feature.fate is Fate.RUN and feature.is_on(value):
            yield key


def _walk(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Feature | None, Any]]:
    for name, value in table.items():
        key = f"{prefix}{name}"
        feature = find(key)
        yield key, feature, value
        if isinstance(value, Mapping) and feature is not None and feature.fate is Fate.READ:
            yield from _walk(value, f"{key}.")


def _sorted(table: Mapping[str, Any], prefix: str, whole: Mapping[str, Any], found: Sorted) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        feature = find(key)
        if feature is None:
            if _unknown(key, value, found):
                kept[name] = value
            continue
        inside = _sorted(value, f"{key}.", whole, found) if isinstance(value, Mapping) and _has_rows(key) else value
        if feature.key == documented_key(key):
            _judge(feature, key, value, whole, found)
        if _is_kept(feature, value, key, found):
            kept[name] = inside
    return kept


def _judge(feature: Feature, key: str, value: object, whole: Mapping[str, Any], found: Sorted) -> None:
    """Say what there is to say of a key that has a row."""
    is_on = feature.is_on(value) and (not feature.within or _at(whole, feature.within) is True)
    if is_on and feature.fate is Fate.REFUSED:
        place = f"{key}.{feature.switch}" if feature.switch and isinstance(value, Mapping) and feature.switch in value else key
        found.refused.append(f"{place}: {feature.why}")
    elif is_on and feature.note:
        found.notes.append(f"{key}: {feature.note}")
    elif feature.removed:
        found.notes.append(f"{key}: DeepSpeed 0.19.8 stops at this key, also where it is off; it is left out here")


def _is_kept(feature: Feature, value: object, key: str, found: Sorted) -> bool:
    """Whether a key stays in what is handed to DeepSpeed."""
    if value is None or feature.fate in (Fate.REFUSED, Fate.LEFT_OUT) or (feature.fate is Fate.RUN and not feature.is_on(value)):
        return False
    if not feature.may_hold_anything or not _holds_text(value, feature.free):
        return True
    if feature.free and not _holds_auto(value):
        found.notes.append(f"{key}: {value!r:.60} is no number; memory does not depend on it")
    return False


def _unknown(key: str, value: object, found: Sorted) -> bool:
    """Whether a key that has no row is kept: DeepSpeed stops at one in a closed table, and ignores
    any other."""
    table, _, last = key.rpartition(".")
    above = features().get(table)
    if above is None or not above.closed:
        if not key.startswith("optimizer.params."):
            found.unknown.append(key)
        return True
    if value != AUTO:  # which DeepSpeed drops before it looks (runtime/config_utils.py)
        near = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in features() if k.rpartition(".")[0] == table], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        found.refused.append(f"{key}: DeepSpeed does not know this key and stops at it{meant}")
    return False


def _has_rows(key: str) -> bool:
    return any(name.startswith(f"{key}.") for name in features())


def _holds_auto(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_auto, value.values()))
    return any(map(_holds_auto, value)) if isinstance(value, list) else value == AUTO


def _holds_text(value: object, is_number: bool) -> bool:
    """Whether a value cannot be handed on: `auto` somewhere in it; of a number, any text or
    null."""
    if not is_number:
        return _holds_auto(value)
    return any(_holds_text(each, True) for each in value) if isinstance(value, list) else isinstance(value, str | None)


def _at(table: object, key: str) -> object:
    for part in key.split("."):
        table = table.get(part) if isinstance(table, Mapping) else None
    return table
