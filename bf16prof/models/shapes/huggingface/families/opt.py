"""OPT: learned positions with two rows in front, an embedding that may be narrower than the model,
no buffers.

transformers 5.23.0: `models/opt/modeling_opt.py` (OPTDecoder, OPTDecoderLayer, OPTForCausalLM),
`configuration_opt.py`.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm, linear
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import language_model
from bf16prof.models.shapes.huggingface.config import Config

POSITION_OFFSET = 2
ROOT = "model.decoder"


def _opt(config: Config) -> Skeleton:
    config.head_width()
    hidden = config.count("hidden_size")
    narrow = config.count_or("word_embed_proj_dim", hidden)
    tokens = ParameterSpec(f"{ROOT}.embed_tokens.weight", (config.count("vocab_size"), narrow), "Embedding")
    rows = config.count("max_position_embeddings") + POSITION_OFFSET
    body = [ParameterSpec(f"{ROOT}.embed_positions.weight", (rows, hidden), "OPTLearnedPositionalEmbedding")]
    if narrow != hidden:
        body += linear(f"{ROOT}.project_out", narrow, hidden, bias=False) + linear(f"{ROOT}.project_in", hidden, narrow, bias=False)
    if config.flag("do_layer_norm_before") and not config.flag("_remove_final_layer_norm"):
        body += _norm(config, f"{ROOT}.final_layer_norm")
    body += [spec for index in config.layers() for spec in _layer(config, f"{ROOT}.layers.{index}", hidden)]
    return Skeleton(tuple(language_model(config, tokens, body)))


def _layer(config: Config, name: str, hidden: int) -> list[ParameterSpec]:
    bias, inner = config.flag("enable_bias"), config.count("ffn_dim")
    parts = ("k_proj", "v_proj", "q_proj", "out_proj")
    return [
        *(spec for part in parts for spec in linear(f"{name}.self_attn.{part}", hidden, hidden, bias=bias)),
        *_norm(config, f"{name}.self_attn_layer_norm"),
        *linear(f"{name}.fc1", inner, hidden, bias=bias),
        *linear(f"{name}.fc2", hidden, inner, bias=bias),
        *_norm(config, f"{name}.final_layer_norm"),
    ]


def _norm(config: Config, name: str) -> list[ParameterSpec]:
    return layer_norm(name, config.count("hidden_size")) if config.flag("layer_norm_elementwise_affine") else []


OPT = {
    "vocab_size": 50_272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
    "max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True,
    "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
}  # fmt: skip

FAMILIES = {"opt": Family("OPTForCausalLM", _opt, OPT)}
