"""Llama and those built like it: rotary positions, RMSNorm before attention and a gated MLP.

transformers 5.23.0: `models/{llama,mistral,qwen2,qwen3}/`, `modeling_*.py` (…DecoderLayer,
…ForCausalLM) and `configuration_*.py`.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import HeadSizes, attention, decoder, gated_mlp, weights
from bf16prof.models.shapes.huggingface.config import Config
from bf16prof.models.shapes.huggingface.rotary import rotary


def _llama(config: Config) -> Skeleton:
    config.head_width()
    return _model(config, "LlamaRMSNorm", bias=config.flag("attention_bias"), mlp_bias=config.flag("mlp_bias"))


def _mistral(config: Config) -> Skeleton:
    return _model(config, "MistralRMSNorm", bias=False)


def _qwen2(config: Config) -> Skeleton:
    return _model(config, "Qwen2RMSNorm", bias=True, output_bias=False)


def _qwen3(config: Config) -> Skeleton:
    return _model(config, "Qwen3RMSNorm", bias=config.flag("attention_bias"), norms_heads=True)


def _model(
    config: Config, norm: str, *, bias: bool, output_bias: bool | None = None, mlp_bias: bool = False, norms_heads: bool = False
) -> Skeleton:
    sizes, intermediate = HeadSizes.of(config), config.count("intermediate_size")

    def layer(name: str, index: int) -> list[ParameterSpec]:
        return [
            *attention(f"{name}.self_attn", sizes, bias=bias, output_bias=output_bias),
            *(weights(f"{name}.self_attn", norm, sizes.width, "q_norm", "k_norm") if norms_heads else ()),
            *gated_mlp(f"{name}.mlp", sizes.hidden, intermediate, bias=mlp_bias),
            *weights(name, norm, sizes.hidden, "input_layernorm", "post_attention_layernorm"),
        ]

    return decoder(config, layer, norm=norm, buffers=rotary(config, sizes.width))


SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}
LLAMA = {**SIZES, "vocab_size": 32_000, "intermediate_size": 11_008, "attention_bias": False, "mlp_bias": False}
MISTRAL = {**SIZES, "vocab_size": 32_000, "intermediate_size": 14_336, "num_key_value_heads": 8}
QWEN2 = {**SIZES, "vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32}
QWEN3 = {**QWEN2, "head_dim": 128, "attention_bias": False}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, LLAMA),
    "mistral": Family("MistralForCausalLM", _mistral, MISTRAL),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, QWEN2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, QWEN3),
}
