"""Reads the values of a `config.json` that decide shapes; whatever cannot be one has no closed
form, and the key is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from bf16prof.models.shapes import NoInventory

MOST_LAYERS = 2**14
LARGEST = 2**40
LAYER_TYPES = ("sliding_attention", "full_attention")
"""What `layer_types` may name."""


@dataclass(frozen=True)
class Config:
    """The content of a `config.json` laid over the defaults of its model type; `null` stands for
    what another value decides."""

    values: Mapping[str, Any]

    def count(self, key: str, most: int = LARGEST) -> int:
        """A whole number above 0."""
        value = self.values.get(key)
        if not _is_whole(value) or not 0 < value < most:
            raise NoInventory(f"model.hf_config.{key}: expected a whole number above 0, got {shown(value)}")
        return value

    def count_or(self, key: str, otherwise: int) -> int:
        """A whole number above 0; `otherwise` when it is `null` or absent."""
        return otherwise if self.values.get(key) is None else self.count(key)

    def count_or_none(self, key: str) -> int | None:
        """A whole number above 0, or `None` when it is `null` or absent."""
        return None if self.values.get(key) is None else self.count(key)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise NoInventory(f"model.hf_config.{key}: expected true or false, got {shown(value)}")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """A table; an empty one when it is `null` or absent."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise NoInventory(f"model.hf_config.{key}: expected a table, got {shown(value)}")
        return value

    def items(self, key: str) -> list[Any]:
        """A list; an empty one when it is `null` or absent."""
        value = self.values.get(key) or []
        if not isinstance(value, list):
            raise NoInventory(f"model.hf_config.{key}: expected a list, got {shown(value)}")
        return value

    def layers(self, key: str = "num_hidden_layers") -> range:
        """The numbers of the layers."""
        return range(self.count(key, MOST_LAYERS))

    def head_width(self, hidden: str = "hidden_size", heads: str = "num_attention_heads") -> int:
        """The hidden size by the number of heads, which must divide it."""
        if self.count(hidden) % self.count(heads):
            raise NoInventory(f"model.hf_config.{hidden} ({self.count(hidden)}) is not a multiple of {heads} ({self.count(heads)})")
        return self.count(hidden) // self.count(heads)


def shown(value: object) -> str:
    """A value in a message."""
    return repr(value)[:60]


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
