"""GPT-2: learned positions, projections stored the other way round (Conv1D: [inputs, outputs]), no
buffers.

transformers 5.23.0: `models/gpt2/modeling_gpt2.py` (GPT2Block, GPT2LMHeadModel),
`configuration_gpt2.py`; `pytorch_utils.py` Conv1D.
"""

from __future__ import annotations

from bf16prof.models.shapes import ParameterSpec, layer_norm
from bf16prof.models.shapes.huggingface import Family, Skeleton
from bf16prof.models.shapes.huggingface.blocks import language_model
from bf16prof.models.shapes.huggingface.config import Config


def _gpt2(config: Config) -> Skeleton:
    config.head_width("n_embd", "n_head")
    hidden = config.count("n_embd")
    tokens = ParameterSpec("transformer.wte.weight", (config.count("vocab_size"), hidden), "Embedding")
    positions = ParameterSpec("transformer.wpe.weight", (config.count("n_positions"), hidden), "Embedding")
    inner = config.count_or("n_inner", 4 * hidden)
    layers = [spec for index in config.layers("n_layer") for spec in _block(f"transformer.h.{index}", hidden, inner)]
    return Skeleton(tuple(language_model(config, tokens, [positions, *layers, *layer_norm("transformer.ln_f", hidden)])))


def _block(name: str, hidden: int, inner: int) -> list[ParameterSpec]:
    return [
        *layer_norm(f"{name}.ln_1", hidden),
        *_conv1d(f"{name}.attn.c_attn", 3 * hidden, hidden),
        *_conv1d(f"{name}.attn.c_proj", hidden, hidden),
        *layer_norm(f"{name}.ln_2", hidden),
        *_conv1d(f"{name}.mlp.c_fc", inner, hidden),
        *_conv1d(f"{name}.mlp.c_proj", hidden, inner),
    ]


def _conv1d(name: str, outputs: int, inputs: int) -> list[ParameterSpec]:
    return [ParameterSpec(f"{name}.weight", (inputs, outputs), "Conv1D"), ParameterSpec(f"{name}.bias", (outputs,), "Conv1D")]


GPT2 = {"vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "tie_word_embeddings": True}
ALIASES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
}  # fmt: skip

FAMILIES = {"gpt2": Family("GPT2LMHeadModel", _gpt2, GPT2, ALIASES)}
