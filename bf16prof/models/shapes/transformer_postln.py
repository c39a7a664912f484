"""The model of the published example: learned positions, bidirectional post-LN blocks, an untied
output head with bias.

Structure: DeepSpeedExamples training/bf16_master_weight (train.py, SimpleTransformerModel); 12
parameters per layer and 4 outside.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm, linear, require
from bf16prof.profiles.models import ModelSettings


def parameters(model: ModelSettings) -> list[ParameterSpec]:
    """The inventory, in module order."""
    require(model.num_kv_heads in (None, model.num_heads), "model.num_kv_heads: transformer-postln has no grouped-query attention")
    require(not model.tie_embeddings, "model.tie_embeddings: the head of transformer-postln has a bias and is never tied")
    hidden = model.hidden_size
    specs = [
        ParameterSpec("embedding.weight", (model.vocab_size, hidden), "Embedding"),
        ParameterSpec("pos_embedding.weight", (model.max_sequence_length, hidden), "Embedding"),
    ]
    for index in range(model.num_layers):
        specs += _block(f"layers.{index}", hidden, model.intermediate_size or 4 * hidden)
    return specs + linear("output_proj", model.vocab_size, hidden)


def _block(name: str, hidden: int, intermediate: int) -> list[ParameterSpec]:
    return [
        ParameterSpec(f"{name}.attention.in_proj_weight", (3 * hidden, hidden), "MultiheadAttention"),
        ParameterSpec(f"{name}.attention.in_proj_bias", (3 * hidden,), "MultiheadAttention"),
        *linear(f"{name}.attention.out_proj", hidden, hidden, layer="NonDynamicallyQuantizableLinear"),
        *layer_norm(f"{name}.norm1", hidden),
        *layer_norm(f"{name}.norm2", hidden),
        *linear(f"{name}.ff.0", intermediate, hidden),
        *linear(f"{name}.ff.2", hidden, intermediate),
    ]
