"""Phi (1 to 2): attention and MLP side by side behind one layer norm, biases everywhere, the output
head's included.

transformers 5.23.0: `models/phi/modeling_phi.py` (PhiDecoderLayer, PhiForCausalLM),
`configuration_phi.py`.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm, linear
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import HeadSizes, attention, language_model
from bf16prof.models.shapes.huggingface.config import Config
from bf16prof.models.shapes.huggingface.rotary import rotary


def _phi(config: Config) -> Skeleton:
    sizes, intermediate = HeadSizes.of(config), config.count("intermediate_size")
    tokens = ParameterSpec("model.embed_tokens.weight", (config.count("vocab_size"), sizes.hidden), "Embedding")
    layers = [spec for index in config.layers() for spec in _layer(config, f"model.layers.{index}", sizes, intermediate)]
    body = [*layers, *layer_norm("model.final_layernorm", sizes.hidden)]
    turning = rotary(config, sizes.width, share=0.5, by_default=True)
    return Skeleton(tuple(language_model(config, tokens, body, bias=True)), tuple(turning))


def _layer(config: Config, name: str, sizes: HeadSizes, intermediate: int) -> list[ParameterSpec]:
    width = sizes.hidden // sizes.heads
    norms = [spec for part in ("q_layernorm", "k_layernorm") for spec in layer_norm(f"{name}.self_attn.{part}", width)]
    return [
        *attention(f"{name}.self_attn", sizes, bias=True, output="dense"),
        *(norms if config.flag("qk_layernorm") else ()),
        *linear(f"{name}.mlp.fc1", intermediate, sizes.hidden),
        *linear(f"{name}.mlp.fc2", sizes.hidden, intermediate),
        *layer_norm(f"{name}.input_layernorm", sizes.hidden),
    ]


PHI = {
    "vocab_size": 51_200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    "qk_layernorm": False, "tie_word_embeddings": False,
}  # fmt: skip

FAMILIES = {"phi": Family("PhiForCausalLM", _phi, PHI)}
