"""GPT-2 (Radford et al. 2019): learned positions, causal pre-LN blocks with biases, the head tied
to the embedding by default.

Sizes and order as in Hugging Face's GPT2LMHeadModel; the projections are stored as `nn.Linear`
weights (its Conv1D stores the transpose).
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm, linear, require
from bf16prof.profiles.models import ModelSettings


def parameters(model: ModelSettings) -> list[ParameterSpec]:
    """The inventory, in module order."""
    require(model.num_kv_heads in (None, model.num_heads), "model.num_kv_heads: gpt2 has no grouped-query attention")
    hidden = model.hidden_size
    is_tied = model.tie_embeddings is None or model.tie_embeddings
    specs = [
        ParameterSpec("wte.weight", (model.vocab_size, hidden), "Embedding", tied="Linear" if is_tied else ""),
        ParameterSpec("wpe.weight", (model.max_sequence_length, hidden), "Embedding"),
    ]
    for index in range(model.num_layers):
        specs += _block(f"h.{index}", hidden, model.intermediate_size or 4 * hidden)
    specs += layer_norm("ln_f", hidden)
    return specs if is_tied else [*specs, *linear("lm_head", model.vocab_size, hidden, bias=False)]


def _block(name: str, hidden: int, intermediate: int) -> list[ParameterSpec]:
    return [
        *layer_norm(f"{name}.ln_1", hidden),
        *linear(f"{name}.attn.c_attn", 3 * hidden, hidden),
        *linear(f"{name}.attn.c_proj", hidden, hidden),
        *layer_norm(f"{name}.ln_2", hidden),
        *linear(f"{name}.mlp.c_fc", intermediate, hidden),
        *linear(f"{name}.mlp.c_proj", hidden, intermediate),
    ]
