"""Llama (Touvron et al. 2023; Llama 3, 2024): rotary positions, RMSNorm, SwiGLU, grouped-query
attention, an untied head by default.

Sizes and order as in Hugging Face's LlamaForCausalLM; no biases.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, linear, require
from bf16prof.profiles.models import ModelSettings


def parameters(model: ModelSettings) -> list[ParameterSpec]:
    """The inventory, in module order."""
    heads = model.num_kv_heads or model.num_heads
    require(model.num_heads % heads == 0, "model.num_heads must be a multiple of model.num_kv_heads")
    require(model.hidden_size // model.num_heads % 2 == 0, "model.hidden_size / model.num_heads must be even: rotary positions turn pairs")
    hidden = model.hidden_size
    tied = "Linear" if model.tie_embeddings else ""
    specs = [ParameterSpec("embed_tokens.weight", (model.vocab_size, hidden), "Embedding", tied)]
    for index in range(model.num_layers):
        specs += _block(f"layers.{index}", hidden, hidden // model.num_heads * heads, model.intermediate_size or 4 * hidden)
    specs.append(ParameterSpec("norm.weight", (hidden,), "RMSNorm"))
    return specs if model.tie_embeddings else [*specs, *linear("lm_head", model.vocab_size, hidden, bias=False)]


def _block(name: str, hidden: int, kv_width: int, intermediate: int) -> list[ParameterSpec]:
    return [
        *linear(f"{name}.self_attn.q_proj", hidden, hidden, bias=False),
        *linear(f"{name}.self_attn.k_proj", kv_width, hidden, bias=False),
        *linear(f"{name}.self_attn.v_proj", kv_width, hidden, bias=False),
        *linear(f"{name}.self_attn.o_proj", hidden, hidden, bias=False),
        *linear(f"{name}.mlp.gate_proj", intermediate, hidden, bias=False),
        *linear(f"{name}.mlp.up_proj", intermediate, hidden, bias=False),
        *linear(f"{name}.mlp.down_proj", hidden, intermediate, bias=False),
        ParameterSpec(f"{name}.input_layernorm.weight", (hidden,), "RMSNorm"),
        ParameterSpec(f"{name}.post_attention_layernorm.weight", (hidden,), "RMSNorm"),
    ]
