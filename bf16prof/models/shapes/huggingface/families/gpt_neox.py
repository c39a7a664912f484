"""GPT-NeoX (Pythia): rotary positions over a part of each head, attention and MLP side by side, an
output head of its own.

transformers 5.23.0: `models/gpt_neox/modeling_gpt_neox.py` (GPTNeoXLayer, GPTNeoXForCausalLM),
`configuration_gpt_neox.py`.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm, linear
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import language_model
from bf16prof.models.shapes.huggingface.config import Config
from bf16prof.models.shapes.huggingface.rotary import rotary


def _gpt_neox(config: Config) -> Skeleton:
    hidden, width = config.count("hidden_size"), config.head_width()
    tokens = ParameterSpec("gpt_neox.embed_in.weight", (config.count("vocab_size"), hidden), "Embedding")
    layers = [spec for index in config.layers() for spec in _layer(config, f"gpt_neox.layers.{index}", hidden)]
    body = [*layers, *layer_norm("gpt_neox.final_layer_norm", hidden)]
    turning = rotary(config, config.count_or("head_dim", width), "gpt_neox.rotary_emb", share=0.25, by_default=True, stored="rotary_pct")
    return Skeleton(tuple(language_model(config, tokens, body)), tuple(turning))


def _layer(config: Config, name: str, hidden: int) -> list[ParameterSpec]:
    bias, intermediate = config.flag("attention_bias"), config.count("intermediate_size")
    return [
        *layer_norm(f"{name}.input_layernorm", hidden),
        *layer_norm(f"{name}.post_attention_layernorm", hidden),
        *linear(f"{name}.attention.query_key_value", 3 * hidden, hidden, bias=bias),
        *linear(f"{name}.attention.dense", hidden, hidden, bias=bias),
        *linear(f"{name}.mlp.dense_h_to_4h", intermediate, hidden),
        *linear(f"{name}.mlp.dense_4h_to_h", hidden, intermediate),
    ]


GPT_NEOX = {
    "vocab_size": 50_432, "hidden_size": 6144, "intermediate_size": 24_576, "num_hidden_layers": 44, "num_attention_heads": 64,
    "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip

FAMILIES = {"gpt_neox": Family("GPTNeoXForCausalLM", _gpt_neox, GPT_NEOX)}
