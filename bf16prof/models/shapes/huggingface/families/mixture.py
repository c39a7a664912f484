"""Mixtures of experts: Mixtral, Qwen2-MoE with its shared expert, Qwen3-MoE with normed heads;
layers without experts where they say so.

transformers 5.23.0: `models/{mixtral,qwen2_moe,qwen3_moe}/`, `modeling_*.py` (…SparseMoeBlock,
…DecoderLayer, …ForCausalLM) and `configuration_*.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from bf16prof.models.shapes import ParameterSpec, linear
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import HeadSizes, attention, decoder, experts, gated_mlp, weights
from bf16prof.models.shapes.huggingface.config import Config
from bf16prof.models.shapes.huggingface.rotary import rotary

Mixture = Callable[[Config, str], list[ParameterSpec]]
"""From a module's name to the parameters of router and experts."""


def _mixtral(config: Config) -> Skeleton:
    return _model(config, "Mixtral", _mixtral_mixture, bias=False)


def _qwen2_moe(config: Config) -> Skeleton:
    return _model(config, "Qwen2Moe", _qwen2_mixture, bias=config.flag("qkv_bias"), output_bias=False)


def _qwen3_moe(config: Config) -> Skeleton:
    return _model(config, "Qwen3Moe", _qwen3_mixture, bias=config.flag("attention_bias"), norms_heads=True)


def _model(
    config: Config, family: str, mixture: Mixture, *, bias: bool, output_bias: bool | None = None, norms_heads: bool = False
) -> Skeleton:
    sizes, norm = HeadSizes.of(config), f"{family}RMSNorm"

    def layer(name: str, index: int) -> list[ParameterSpec]:
        dense = mixture is not _mixtral_mixture and not has_experts(config, index)
        return [
            *attention(f"{name}.self_attn", sizes, bias=bias, output_bias=output_bias),
            *(weights(f"{name}.self_attn", norm, sizes.width, "q_norm", "k_norm") if norms_heads else ()),
            *(gated_mlp(f"{name}.mlp", sizes.hidden, config.count("intermediate_size")) if dense else mixture(config, f"{name}.mlp")),
            *weights(name, norm, sizes.hidden, "input_layernorm", "post_attention_layernorm"),
        ]

    return decoder(config, layer, norm=norm, buffers=rotary(config, sizes.width))


def has_experts(config: Config, index: int) -> bool:
    """Whether a layer of Qwen's mixtures has experts."""
    if config.values["num_experts"] == 0:
        return False
    return index not in config.items("mlp_only_layers") and (index + 1) % config.count("decoder_sparse_step") == 0


def _mixtral_mixture(config: Config, name: str) -> list[ParameterSpec]:
    count, hidden, width = config.count("num_local_experts"), config.count("hidden_size"), config.count("intermediate_size")
    router = ParameterSpec(f"{name}.gate.weight", (count, hidden), "MixtralTopKRouter")
    return [router, *experts(f"{name}.experts", "MixtralExperts", count, hidden, width)]


def _qwen2_mixture(config: Config, name: str) -> list[ParameterSpec]:
    count, hidden, width = config.count("num_experts"), config.count("hidden_size"), config.count("moe_intermediate_size")
    return [
        ParameterSpec(f"{name}.gate.weight", (count, hidden), "Qwen2MoeTopKRouter"),
        *experts(f"{name}.experts", "Qwen2MoeExperts", count, hidden, width),
        *gated_mlp(f"{name}.shared_expert", hidden, config.count("shared_expert_intermediate_size")),
        *linear(f"{name}.shared_expert_gate", 1, hidden, bias=False),
    ]


def _qwen3_mixture(config: Config, name: str) -> list[ParameterSpec]:
    count, hidden, width = config.count("num_experts"), config.count("hidden_size"), config.count("moe_intermediate_size")
    router = ParameterSpec(f"{name}.gate.weight", (count, hidden), "Qwen3MoeTopKRouter")
    return [*experts(f"{name}.experts", "Qwen3MoeExperts", count, hidden, width), router]


MIXTRAL = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_MOE = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
    "decoder_sparse_step": 1, "qkv_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_MOE = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "decoder_sparse_step": 1, "attention_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip

FAMILIES = {
    "mixtral": Family("MixtralForCausalLM", _mixtral, MIXTRAL, {"num_experts": "num_local_experts"}),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, QWEN2_MOE),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, QWEN3_MOE, {"num_local_experts": "num_experts"}),
}
