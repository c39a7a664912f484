"""BLOOM: ALiBi (computed in every forward, so no buffers), a layer norm on the embedding, an MLP of
four times the hidden size.

transformers 5.23.0: `models/bloom/modeling_bloom.py` (BloomBlock, BloomForCausalLM),
`configuration_bloom.py`.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm, linear
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import language_model
from bf16prof.models.shapes.huggingface.config import Config


def _bloom(config: Config) -> Skeleton:
    config.head_width(heads="n_head")
    hidden = config.count("hidden_size")
    tokens = ParameterSpec("transformer.word_embeddings.weight", (config.count("vocab_size"), hidden), "Embedding")
    layers = [spec for index in config.layers("n_layer") for spec in _block(f"transformer.h.{index}", hidden)]
    body = [*layer_norm("transformer.word_embeddings_layernorm", hidden), *layers, *layer_norm("transformer.ln_f", hidden)]
    return Skeleton(tuple(language_model(config, tokens, body)))


def _block(name: str, hidden: int) -> list[ParameterSpec]:
    return [
        *layer_norm(f"{name}.input_layernorm", hidden),
        *linear(f"{name}.self_attention.query_key_value", 3 * hidden, hidden),
        *linear(f"{name}.self_attention.dense", hidden, hidden),
        *layer_norm(f"{name}.post_attention_layernorm", hidden),
        *linear(f"{name}.mlp.dense_h_to_4h", 4 * hidden, hidden),
        *linear(f"{name}.mlp.dense_4h_to_h", hidden, 4 * hidden),
    ]


BLOOM = {"vocab_size": 250_880, "hidden_size": 64, "n_layer": 2, "n_head": 8, "tie_word_embeddings": True}
ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"}

FAMILIES = {"bloom": Family("BloomForCausalLM", _bloom, BLOOM, ALIASES)}
