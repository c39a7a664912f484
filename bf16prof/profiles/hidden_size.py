"""The hidden size of a model, from which transformers and accelerate make ZeRO's buckets and
thresholds.

The order is theirs (`transformers/integrations/deepspeed.py`, trainer_config_finalize): the model's
own, the largest of several, then the same of its text part. What a file leaves out is the default
of its model type (`hidden_sizes.toml`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from bf16prof.profiles.models import HuggingFaceSettings, ModelSettings
from bf16prof.profiles.settings import Settings
from bf16prof.profiles.shipped import shipped_table

SIZE, SIZES, TEXT = "hidden_size", "hidden_sizes", "text_config"


@dataclass(frozen=True)
class HiddenSize:
    """A hidden size, and the key that it was read from (`text_config.hidden_size`, `n_embd`,
    ...)."""

    value: int
    key: str


def hidden_size(model: Settings) -> HiddenSize | None:
    """The hidden size of a profile's model; `None` where it is not known, as of what a function
    returns."""
    if isinstance(model, ModelSettings):
        return HiddenSize(model.hidden_size, "model.hidden_size")
    return of_config(model.hf_config) if isinstance(model, HuggingFaceSettings) else None


def of_config(config: Mapping[str, Any]) -> HiddenSize | None:
    """The hidden size that `model.config` has for the content of a `config.json`."""
    facts, type_ = _facts(), config.get("model_type")
    if found := _own(config):
        return found
    if type_ in facts.defaults:
        return HiddenSize(facts.defaults[str(type_)], f"{SIZE}, the default of {type_}")
    part = config.get(TEXT)
    text = dict(part) if isinstance(part, Mapping) else {}
    if not text and type_ not in facts.text:
        return None
    if not text and type_ in facts.alone:
        return HiddenSize(facts.alone[str(type_)], f"{TEXT}.{SIZE}, the default of {type_}")
    text.setdefault("model_type", facts.text.get(str(type_)))
    found = _own(text)
    if found is None and text["model_type"] in facts.defaults:
        found = HiddenSize(facts.defaults[text["model_type"]], f"{SIZE}, the default of {text['model_type']}")
    return None if found is None else HiddenSize(found.value, f"{TEXT}.{found.key}")


def _own(config: Mapping[str, Any]) -> HiddenSize | None:
    """What the configuration says itself. A class that has another name for the hidden size takes
    both."""
    for key in (SIZE, _facts().keys.get(str(config.get("model_type")), SIZE)):
        value = config.get(key)
        if _is_size(value):
            return HiddenSize(value, key)
    several = config.get(SIZES)
    if isinstance(several, list) and several and all(map(_is_size, several)):
        return HiddenSize(max(several), f"max({SIZES})")
    return None


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**24


@dataclass(frozen=True)
class _Facts:
    """The table by model type: the key, the default, the type of the text part, the default where
    there is no such part."""

    keys: Mapping[str, str]
    defaults: Mapping[str, int]
    text: Mapping[str, str]
    alone: Mapping[str, int]


@functools.cache
def _facts() -> _Facts:
    table = shipped_table("hidden_sizes.toml")
    keys, defaults, text, alone = (_inverted(table[part]) for part in ("keys", "defaults", "text", "alone"))
    return _Facts(keys, _numbers(defaults), text, _numbers(alone))


def _inverted(part: Mapping[str, list[str]]) -> dict[str, str]:
    return {type_: key for key, types in part.items() for type_ in types}


def _numbers(part: Mapping[str, str]) -> dict[str, int]:
    return {type_: int(size) for type_, size in part.items()}
