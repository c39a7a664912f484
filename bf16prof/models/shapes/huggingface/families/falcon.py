"""Falcon: one key and value head, groups of them (the new decoder architecture) or as many as
heads; one, two or two other layer norms.

transformers 5.23.0: `models/falcon/modeling_falcon.py` (FalconDecoderLayer, FalconForCausalLM),
`configuration_falcon.py`. Its rotary embedding is built, and holds its buffers, even where ALiBi
takes its place.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm, linear
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import language_model
from bf16prof.models.shapes.huggingface.config import Config
from bf16prof.models.shapes.huggingface.rotary import rotary

LINEAR = "FalconLinear"


def _falcon(config: Config) -> Skeleton:
    hidden, width = config.count("hidden_size"), config.head_width()
    tokens = ParameterSpec("transformer.word_embeddings.weight", (config.count("vocab_size"), hidden), "Embedding")
    layers = [spec for index in config.layers() for spec in _layer(config, f"transformer.h.{index}", hidden)]
    specs = language_model(config, tokens, [*layers, *layer_norm("transformer.ln_f", hidden)])
    return Skeleton(tuple(specs), tuple(rotary(config, width, "transformer.rotary_emb")))


def _layer(config: Config, name: str, hidden: int) -> list[ParameterSpec]:
    bias, inner = config.flag("bias"), config.count_or("ffn_hidden_size", 4 * hidden)
    return [
        *linear(f"{name}.self_attention.query_key_value", _attention_rows(config, hidden), hidden, bias=bias, layer=LINEAR),
        *linear(f"{name}.self_attention.dense", hidden, hidden, bias=bias, layer=LINEAR),
        *linear(f"{name}.mlp.dense_h_to_4h", inner, hidden, bias=bias, layer=LINEAR),
        *linear(f"{name}.mlp.dense_4h_to_h", hidden, inner, bias=bias, layer=LINEAR),
        *(spec for norm in _norms(config) for spec in layer_norm(f"{name}.{norm}", hidden)),
    ]


def _attention_rows(config: Config, hidden: int) -> int:
    heads, width = config.count("num_attention_heads"), config.head_width()
    if config.flag("new_decoder_architecture"):
        return (2 * config.count_or("num_kv_heads", heads) + heads) * width
    return hidden + 2 * width if config.flag("multi_query") else 3 * hidden


def _norms(config: Config) -> tuple[str, ...]:
    if not config.flag("parallel_attn"):
        return "post_attention_layernorm", "input_layernorm"
    return ("ln_attn", "ln_mlp") if norms_twice(config) else ("input_layernorm",)


def norms_twice(config: Config) -> bool:
    """Whether attention and MLP work in parallel on norms of their own."""
    norms = config.count_or("num_ln_in_parallel_attn", 2 if config.flag("new_decoder_architecture") else 1)
    return config.flag("parallel_attn") and norms == 2


FALCON = {
    "vocab_size": 65_024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "new_decoder_architecture": False,
    "multi_query": True, "parallel_attn": True, "bias": False, "tie_word_embeddings": True,
}  # fmt: skip

FAMILIES = {"falcon": Family("FalconForCausalLM", _falcon, FALCON, {"n_embed": "hidden_size"})}
