"""What the families have in common: attention with grouped heads, gated MLPs, experts, and the way
from embedding to output head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bf16prof.errors import InputError
from bf16prof.models.shapes import NoInventory, ParameterSpec, linear
from bf16prof.models.shapes.huggingface import BufferSpec, Skeleton
from bf16prof.models.shapes.huggingface.config import Config

Layer = Callable[[str, int], list[ParameterSpec]]
"""From a layer's name and number to its parameters."""


@dataclass(frozen=True)
class HeadSizes:
    """The sizes of attention: `width` elements for each of the heads and of the key and value
    heads."""

    hidden: int
    heads: int
    kv_heads: int
    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"model.hf_config.hidden_size ({self.hidden}) is shared by {self.heads} heads: none is left of a head")

    @classmethod
    def of(cls, config: Config) -> HeadSizes:
        """As most configurations say it. A `head_dim` need not be the hidden size by the heads."""
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        kv_heads = config.count_or("num_key_value_heads", heads)
        if heads % kv_heads:
            raise NoInventory(f"model.hf_config.num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
        return cls(hidden, heads, kv_heads, config.count_or("head_dim", hidden // heads))

    @property
    def inputs(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections."""
        return self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width


def attention(name: str, sizes: HeadSizes, *, bias: bool, output: str = "o_proj", output_bias: bool | None = None) -> list[ParameterSpec]:
    """Query, key, value and output projections; the output's bias is as the others' when not
    said."""
    rows = zip(("q_proj", "k_proj", "v_proj"), sizes.inputs, strict=True)
    out = linear(f"{name}.{output}", sizes.hidden, sizes.inputs[0], bias=bias if output_bias is None else output_bias)
    return [*(spec for part, width in rows for spec in linear(f"{name}.{part}", width, sizes.hidden, bias=bias)), *out]


def gated_mlp(name: str, hidden: int, intermediate: int, *, bias: bool = False) -> list[ParameterSpec]:
    """The gate, up and down projections."""
    return [
        *linear(f"{name}.gate_proj", intermediate, hidden, bias=bias),
        *linear(f"{name}.up_proj", intermediate, hidden, bias=bias),
        *linear(f"{name}.down_proj", hidden, intermediate, bias=bias),
    ]


def experts(name: str, layer: str, count: int, hidden: int, intermediate: int) -> list[ParameterSpec]:
    """All experts of a layer: since transformers 5, two tensors with the experts as their first
    dimension."""
    return [
        ParameterSpec(f"{name}.gate_up_proj", (count, 2 * intermediate, hidden), layer),
        ParameterSpec(f"{name}.down_proj", (count, hidden, intermediate), layer),
    ]


def weights(name: str, layer: str, width: int, *parts: str) -> list[ParameterSpec]:
    """The weights [width] of norms without a bias."""
    return [ParameterSpec(f"{name}.{part}.weight", (width,), layer) for part in parts]


def language_model(config: Config, embedding: ParameterSpec, body: Sequence[ParameterSpec], *, bias: bool = False) -> list[ParameterSpec]:
    """Token embedding, body and output head, whose weight is the embedding's when
    `tie_word_embeddings`."""
    vocabulary, width = embedding.shape
    head = linear("lm_head", vocabulary, width, bias=bias)
    if config.flag("tie_word_embeddings"):
        return [dataclasses.replace(embedding, tied="Linear"), *body, *head[1:]]
    return [embedding, *body, *head]


def decoder(config: Config, layer: Layer, *, norm: str, buffers: Sequence[BufferSpec], embedding: str = "Embedding") -> Skeleton:
    """A model as Llama's: `model.embed_tokens`, `model.layers.N`, `model.norm`, `lm_head`. `norm`
    and `embedding` are classes."""
    hidden = config.count("hidden_size")
    tokens = ParameterSpec("model.embed_tokens.weight", (config.count("vocab_size"), hidden), embedding)
    layers = [spec for index in config.layers() for spec in layer(f"model.layers.{index}", index)]
    return Skeleton(tuple(language_model(config, tokens, [*layers, *weights("model", norm, hidden, "norm")])), tuple(buffers))
