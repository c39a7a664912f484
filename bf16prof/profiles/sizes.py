"""Sizes in a Hugging Face configuration that cannot be: each known before any model is built, by
its key alone or by two that clash.

The keys are those by which transformers' configuration classes call the same thing; every default
of theirs passes (820 of 5.23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

Table = Mapping[str, Any]

WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
GROUPS = ("num_key_value_heads", "num_kv_heads")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
COUNTS = {
    *WIDTHS, *HEADS, *GROUPS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
    "decoder_layers", "vocab_size", "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim",
    "n_positions", "head_dim", "d_kv", "moe_intermediate_size", "num_experts_per_tok", "patch_size",
}  # fmt: skip
"""What has to be a whole number above 0, where it is one number at all; `null` stands for what
another value decides."""


def wrong_size(config: Table) -> tuple[str, object] | None:
    """The first key whose value is no size, and that value; those of a part with the part's name
    before them."""
    for prefix, table in _parts(config):
        for key in sorted(COUNTS & table.keys()):
            value = table[key]
            if isinstance(value, list | dict) or value is None or _is_size(value) or (value == 0 and _is_unused(key, table)):
                continue
            return f"{prefix}{key}", value
    return None


def _is_unused(key: str, table: Table) -> bool:
    """Whether a head's width is told in parts (multi-head latent attention), which leave the whole
    at 0."""
    return key == "head_dim" and any(name.endswith("_head_dim") for name in table)


def clash(config: Table) -> str | None:
    """Two sizes of which most models need that one divides or exceeds the other. Told where a model
    could not be built or run: some can."""
    for prefix, table in _parts(config):
        for rule in _RULES:
            if said := rule(table):
                return f"model.hf_config.{prefix}{said}"
    return None


def _width_by_heads(table: Table) -> str | None:
    width, heads = _first(WIDTHS, table), _first(HEADS, table)
    if width and heads and "head_dim" not in table and table[width] % table[heads]:
        return f"{width} ({table[width]}) is not a multiple of {heads} ({table[heads]})"
    return None


def _heads_by_groups(table: Table) -> str | None:
    heads, groups = _first(HEADS, table), _first(GROUPS, table)
    if heads and groups and table[heads] % table[groups]:
        return f"{heads} ({table[heads]}) is not a multiple of {groups} ({table[groups]})"
    return None


def _even_heads(table: Table) -> str | None:
    if _is_size(width := table.get("head_dim")) and width % 2:
        return f"head_dim ({width}) is odd, and rotary positions turn pairs"
    return None


def _token_of_vocabulary(table: Table) -> str | None:
    padding, vocabulary = table.get("pad_token_id"), table.get("vocab_size")
    if _is_size(vocabulary) and isinstance(padding, int) and padding >= vocabulary:
        return f"pad_token_id ({padding}) is not below vocab_size ({vocabulary})"
    return None


def _chosen_of_experts(table: Table) -> str | None:
    experts, chosen = _first(EXPERTS, table), table.get("num_experts_per_tok")
    if experts and _is_size(chosen) and chosen > table[experts]:
        return f"num_experts_per_tok ({chosen}) is more than {experts} ({table[experts]})"
    return None


_RULES: tuple[Callable[[Table], str | None], ...] = (
    _width_by_heads, _heads_by_groups, _even_heads, _token_of_vocabulary, _chosen_of_experts,
)  # fmt: skip


def _parts(config: Table) -> Iterator[tuple[str, Table]]:
    """The configuration, and those of its parts (`text_config`, `vision_config`, ...)."""
    yield "", config
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            yield from ((f"{key}.{prefix}", table) for prefix, table in _parts(value))


def _first(names: tuple[str, ...], table: Table) -> str | None:
    return next((name for name in names if _is_size(table.get(name))), None)


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
