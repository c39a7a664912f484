"""One line for what a profile must not say: where the value came from, its key, and what was
expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from bf16prof.profiles.models import KINDS
from bf16prof.profiles.names import did_you_mean, nearest
from bf16prof.profiles.schema import Profile, ZeroSettings

REASONS = {
    "deepspeed.memory_breakdown": "it resets torch's peak counter on rank 0 (see_memory_usage), so no peak could be measured",
    "deepspeed.zero_optimization.stage": "the ZeRO stage belongs to the case: use --zero",
    "deepspeed.fp16": "the precision belongs to the recipe: use --recipe",
    "deepspeed.torch_autocast": "the precision belongs to the recipe: use --recipe",
    "deepspeed.bf16.enabled": "the precision belongs to the recipe: use --recipe",
    "deepspeed.optimizer": "the optimizer has a table of its own: [optimizer]",
}


def explain(error: ValidationError, origins: Mapping[str, str], default_origin: str) -> str:
    """One line for a validation error."""
    first = error.errors(include_url=False)[0]
    key, expected = _place(first["loc"])
    known = documented(key)
    origin = origin_of(known, origins, default_origin)
    if first["type"] == "extra_forbidden":
        reason = REASONS.get(key)
        if reason:
            return f"{origin}: {key}: refused: {reason}"
        near = did_you_mean(nearest(key.rpartition(".")[2], expected))
        return f"{origin}: {key}: unknown key{f' ({near})' if near else ''}; expected one of {', '.join(expected)}"
    if first["type"] == "missing":
        return f"{origin}: {key}: missing"
    return f"{origin}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {_shown(first['input'])}"


def origin_of(key: str, origins: Mapping[str, str], otherwise: str) -> str:
    """Where a key came from: that of a key inside it, else of the nearest table or list around it
    that somebody gave."""
    inside = (origin for name, origin in origins.items() if name == key or name.startswith(key + "."))
    around = sorted((name for name in origins if key.startswith(name + ".")), key=len)
    return next(inside, origins[around[-1]] if around else otherwise)


def documented(key: str) -> str:
    """The key as DeepSpeed documents it, where a short name stands for it."""
    table, _, last = key.rpartition(".")
    field = ZeroSettings.model_fields.get(last) if table == "deepspeed.zero_optimization" else None
    return f"{table}.{field.alias}" if field and field.alias else key


def _shown(value: object) -> str:
    try:
        return repr(str(value)[:60])
    except ValueError:  # Python prints no integer of more than 4,300 digits; TOML can hold one in hexadecimal
        return "a number of thousands of digits"


def _place(location: Sequence[int | str]) -> tuple[str, list[str]]:
    """The dotted key of a location of pydantic's, without the tag of the model's kind, and the keys
    of the table that holds it."""
    keys: list[str] = []
    table: Any = Profile
    holder: Any = Profile
    for part in location:
        if keys == ["model"] and table not in KINDS.values():
            table = KINDS[str(part)]
            continue
        holder, table = table, _inside(table, str(part))
        keys.append(str(part))
    fields = holder.model_fields.items() if isinstance(holder, type) and issubclass(holder, BaseModel) else ()
    return ".".join(keys), [field.alias or name for name, field in fields]


def _inside(table: Any, part: str) -> Any:
    """What the schema says of one key of a table; `None` if nothing."""
    if isinstance(table, type) and issubclass(table, BaseModel):
        field = table.model_fields.get(part)
        return field.annotation if field else None
    return get_args(table)[1] if get_origin(table) is dict else None
