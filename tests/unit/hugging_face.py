"""Tiny configurations of every model type whose closed form is known, one of each and randomly
drawn ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

GROUPED = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 101, "max_position_embeddings": 64,
}  # fmt: skip
UNGROUPED = {key: value for key, value in GROUPED.items() if key != "num_key_value_heads"}
EXPERTS = {**GROUPED, "moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
TINY: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "head_dim": 6},
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 10},
    "gemma": {**GROUPED, "head_dim": 10},
    "gemma2": {**GROUPED, "head_dim": 10, "query_pre_attn_scalar": 12},
    "gemma3_text": {**GROUPED, "head_dim": 10, "num_hidden_layers": 7},
    "phi": UNGROUPED,
    "phi3": {**GROUPED, "pad_token_id": 0, "original_max_position_embeddings": 16, "rope_scaling": LONG},
    "gpt2": {"n_embd": 36, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 64},
    "gpt_neox": UNGROUPED,
    "opt": {**UNGROUPED, "ffn_dim": 40, "word_embed_proj_dim": 20},
    "bloom": {"hidden_size": 36, "n_layer": 2, "n_head": 4, "vocab_size": 101},
    "falcon": UNGROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 3},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "qwen3_moe": {**EXPERTS, "head_dim": 10},
}
"""One configuration of every model type; its class is that of transformers' own choice."""


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    """The tiny configuration of a model type."""
    return {"model_type": model_type, **TINY[model_type], **changes}


def _optional(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these keys."""
    return st.fixed_dictionaries({}, optional=values)


FLAG, SMALL = st.booleans(), st.integers(1, 33)
ROPE = st.sampled_from([
    None, {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
])  # fmt: skip
ROTARY = {"rope_scaling": ROPE}
HEAD = {"head_dim": st.sampled_from([6, 10, 16])}
PARTIAL = {"partial_rotary_factor": st.sampled_from([0.25, 0.4, 0.5, 1.0])}
OFTEN = {"tie_word_embeddings": FLAG, "intermediate_size": SMALL, "vocab_size": SMALL}
CHOICES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "llama": {
        **OFTEN,
        **ROTARY,
        **HEAD,
        **PARTIAL,
        "attention_bias": FLAG,
        "mlp_bias": FLAG,
        "num_key_value_heads": st.sampled_from([None, 1, 4]),
    },
    "mistral": {**OFTEN, **ROTARY, **HEAD, "attention_bias": FLAG, "sliding_window": st.none() | SMALL},
    "qwen2": {**OFTEN, **ROTARY, **HEAD, "attention_bias": FLAG, "num_key_value_heads": st.sampled_from([None, 1, 4])},
    "qwen3": {**OFTEN, **ROTARY, **HEAD, "attention_bias": FLAG, "num_key_value_heads": st.sampled_from([None, 1, 4])},
    "gemma": {**OFTEN, **ROTARY, **HEAD, "attention_bias": FLAG},
    "gemma2": {**OFTEN, **ROTARY, **HEAD, "attention_bias": FLAG},
    "gemma3_text": {
        **OFTEN,
        **HEAD,
        "attention_bias": FLAG,
        "num_hidden_layers": st.integers(1, 7),
        "sliding_window_pattern": st.integers(1, 8),
        "rope_scaling": st.sampled_from([None, {"rope_type": "linear", "factor": 8.0}]),
    },
    "phi": {**OFTEN, **ROTARY, **HEAD, **PARTIAL, "qk_layernorm": FLAG, "num_key_value_heads": st.sampled_from([None, 1, 2])},
    "phi3": {**OFTEN, **PARTIAL, "num_key_value_heads": st.sampled_from([None, 1, 4]), "rope_scaling": st.none()},
    "gpt2": {
        "tie_word_embeddings": FLAG,
        "n_inner": st.none() | SMALL,
        "hidden_size": st.sampled_from([8, 20]),
        "num_hidden_layers": st.integers(1, 3),
        "n_layer": st.integers(1, 3),
    },
    "gpt_neox": {
        **OFTEN,
        **ROTARY,
        **PARTIAL,
        "rotary_pct": st.sampled_from([0.25, 0.4, 1.0]),
        "attention_bias": FLAG,
        "use_parallel_residual": FLAG,
    },
    "opt": {
        "tie_word_embeddings": FLAG,
        "word_embed_proj_dim": st.sampled_from([None, 48, 7]),
        "do_layer_norm_before": FLAG,
        "_remove_final_layer_norm": FLAG,
        "enable_bias": FLAG,
        "layer_norm_elementwise_affine": FLAG,
    },
    "bloom": {
        "tie_word_embeddings": FLAG,
        "n_embed": st.sampled_from([8, 20]),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([1, 2]),
    },
    "falcon": {
        **OFTEN,
        **ROTARY,
        "new_decoder_architecture": FLAG,
        "multi_query": FLAG,
        "parallel_attn": FLAG,
        "bias": FLAG,
        "alibi": FLAG,
        "num_kv_heads": st.sampled_from([None, 1, 2]),
        "num_ln_in_parallel_attn": st.sampled_from([None, 1, 2]),
        "ffn_hidden_size": st.none() | SMALL,
        "n_embed": st.sampled_from([8, 20]),
    },
    "mixtral": {**OFTEN, **ROTARY, **HEAD, "num_local_experts": st.integers(2, 4), "mlp_only_layers": st.just([0])},
    "qwen2_moe": {
        **OFTEN,
        **ROTARY,
        "qkv_bias": FLAG,
        "num_experts": st.integers(0, 4),
        "mlp_only_layers": st.none() | st.lists(st.integers(0, 3)),
        "decoder_sparse_step": st.integers(1, 3),
        "shared_expert_intermediate_size": SMALL,
    },
    "qwen3_moe": {
        **OFTEN,
        **ROTARY,
        **HEAD,
        "attention_bias": FLAG,
        "num_experts": st.integers(0, 4),
        "mlp_only_layers": st.none() | st.lists(st.integers(0, 3)),
        "decoder_sparse_step": st.integers(1, 3),
        "num_local_experts": st.integers(1, 4),
    },
}
"""By model type, keys that move parameters or buffers, and some that do not."""


def drawn(model_type: str) -> st.SearchStrategy[Mapping[str, Any]]:
    """A configuration of a model type: the tiny one, some of its keys left out or drawn."""
    kept = {key: value for key, value in config(model_type).items() if key != "head_dim"}
    return _optional(**CHOICES[model_type]).map(lambda changes: {**kept, **changes}).filter(_turns_pairs)


def _turns_pairs(content: Mapping[str, Any]) -> bool:
    """Whether a yarn is over whole heads: over an odd number of dimensions it is either refused or
    broken."""
    return "yarn" not in str(content.get("rope_scaling")) or not {"partial_rotary_factor", "rotary_pct"} & set(content)
