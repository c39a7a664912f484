"""Gemma, Gemma 2 and the text model of Gemma 3: a scaled embedding, which the head shares, and from
Gemma 2 on four norms a layer.

transformers 5.23.0: `models/{gemma,gemma2,gemma3}/`, `modeling_*.py` (…DecoderLayer, …ForCausalLM,
…RotaryEmbedding) and `configuration_*.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.models.shapes import NoInventory, ParameterSpec
from bf16prof.models.shapes.huggingface import BufferSpec, Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import HeadSizes, attention, decoder, gated_mlp, weights
from bf16prof.models.shapes.huggingface.config import LAYER_TYPES, Config, shown
from bf16prof.models.shapes.huggingface.rotary import frequencies, rotary

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _gemma(config: Config) -> Skeleton:
    return _model(config, "Gemma", TWO_NORMS, rotary(config, HeadSizes.of(config).width))


def _gemma2(config: Config) -> Skeleton:
    config.head_width()
    return _model(config, "Gemma2", FOUR_NORMS, rotary(config, HeadSizes.of(config).width))


def _gemma3(config: Config) -> Skeleton:
    config.head_width()
    return _model(config, "Gemma3", FOUR_NORMS, _rotary_by_type(config), norms_heads=True)


def _model(config: Config, family: str, norms: Sequence[str], turning: Sequence[BufferSpec], *, norms_heads: bool = False) -> Skeleton:
    sizes, intermediate, norm = HeadSizes.of(config), config.count("intermediate_size"), f"{family}RMSNorm"
    bias = config.flag("attention_bias")

    def layer(name: str, index: int) -> list[ParameterSpec]:
        return [
            *attention(f"{name}.self_attn", sizes, bias=bias),
            *(weights(f"{name}.self_attn", norm, sizes.width, "q_norm", "k_norm") if norms_heads else ()),
            *gated_mlp(f"{name}.mlp", sizes.hidden, intermediate),
            *weights(name, norm, sizes.hidden, *norms),
        ]

    scale = BufferSpec("model.embed_tokens.embed_scale", 1, is_value=True)
    return decoder(config, layer, norm=norm, buffers=[scale, *turning], embedding=f"{family}TextScaledWordEmbedding")


def _rotary_by_type(config: Config) -> list[BufferSpec]:
    """Gemma 3 turns by the type of layer, each type with frequencies of its own; `rope_scaling` is
    of full attention."""
    pattern, table, scaling = config.count("sliding_window_pattern"), config.table("rope_parameters"), config.table("rope_scaling")
    types = config.items("layer_types") or [LAYER_TYPES[(index + 1) % pattern == 0] for index in config.layers()]
    buffers = []
    for name in sorted({str(found) for found in types}):
        own = {**(table.get(name) or {}), **(scaling if name == "full_attention" else {})}
        if name not in LAYER_TYPES or "partial_rotary_factor" in own:
            raise NoInventory(f"model.hf_config.layer_types: {shown(name)} with rope_parameters {shown(own)} is not modelled")
        kind = own.get("rope_type", own.get("type", "default"))
        buffers += frequencies(kind, HeadSizes.of(config).width, f"model.rotary_emb.{name}_")
    return buffers


GEMMA = {
    "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 256, "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2 = {
    **GEMMA, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
GEMMA3 = {**GEMMA2, "vocab_size": 262_208, "sliding_window_pattern": 6}

FAMILIES = {
    "gemma": Family("GemmaForCausalLM", _gemma, GEMMA),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, GEMMA2),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, GEMMA3),
}
