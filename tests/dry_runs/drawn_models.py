"""Small models of every model type that the installed transformers has: its own default
configuration, with sizes drawn anew."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from bf16prof.cases import Job, Selection, expand
from bf16prof.engine.constraints import admit
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.vocabulary import Device

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "hidden_dim", "word_embed_proj_dim", "projection_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
GROUPS = ("num_key_value_heads", "num_kv_heads")
INNER = (
    "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size",
    "shared_expert_intermediate_size", "mlp_dim",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
HEAD = ("head_dim", "d_kv", "d_head")
LATENT = ("kv_lora_rank", "qk_rope_head_dim")
"""Multi-head latent attention has as many key heads as heads, and the widths of its parts, which
stay as they are."""
CHOSEN = ("num_experts_per_tok", "moe_k")
ROUTING_GROUPS = ("n_group", "topk_group")
"""Experts are chosen from some of the groups that they are parted into."""
VOCABULARY = 1000
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "mask_token_id")

RECIPES = ("bf16-full", "bf16-fp32-master", "fp32", "bf16-full-autocast", "autocast-fp32")


def model_types() -> list[str]:
    """Every model type of the installed transformers."""
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING)


def configuration(model_type: str, rng: random.Random) -> dict[str, Any]:
    """A small configuration of a model type. Whatever its class raises is raised."""
    from transformers import CONFIG_MAPPING

    heads = rng.choice((2, 4))
    drawn = {
        "layers": rng.choice((2, 3)), "width": heads * 32 * rng.choice((1, 2)), "heads": heads, "inner": rng.choice((128, 320)),
        "experts": rng.choice((4, 8)),
    }  # fmt: skip
    return {**_smaller(CONFIG_MAPPING[model_type]().to_dict(), drawn), "model_type": model_type}


def _smaller(content: Mapping[str, Any], drawn: Mapping[str, int]) -> dict[str, Any]:
    """What is changed of a configuration, and of those inside it."""
    deep = next((content[key] for key in LAYERS if isinstance(content.get(key), int)), None)
    changed: dict[str, Any] = {}
    is_latent = any(key in content for key in LATENT)
    is_pyramid = any(isinstance(content.get(key), list) for key in HEADS)  # heads by stage, of which each has its own width
    sizes = {
        LAYERS: drawn["layers"], () if is_pyramid else WIDTHS: drawn["width"], HEADS: drawn["heads"], INNER: drawn["inner"],
        EXPERTS: drawn["experts"],
        GROUPS: drawn["heads"] // (1 if is_latent else 2), () if is_latent else HEAD: drawn["width"] // drawn["heads"],
        ("vocab_size",): VOCABULARY, CHOSEN: 2, ROUTING_GROUPS: 1,
    }  # fmt: skip
    for names, value in sizes.items():
        changed |= {name: value for name in names if isinstance(content.get(name), int)}
    for key, value in content.items():
        if isinstance(value, dict) and "model_type" in value:
            changed[key] = {**_smaller(value, drawn), "model_type": value["model_type"]}
        elif isinstance(value, list) and deep and len(value) == deep:
            changed[key] = value[: drawn["layers"]]
        elif key in TOKENS and isinstance(value, int) and value >= VOCABULARY:
            changed[key] = 0
    return changed


def _images(model_type: str) -> dict[str, Any]:
    """What a model that reads images alone is called with."""
    from transformers import CONFIG_MAPPING

    content = CONFIG_MAPPING[model_type]().to_dict()
    size, channels = content.get("image_size"), content.get("num_channels")
    if "vocab_size" in content or any(isinstance(value, dict) and "vocab_size" in value for value in content.values()):
        return {}
    if not isinstance(channels, int) or not isinstance(size, int | list):
        return {}
    extents = size if isinstance(size, list) else [size, size]
    return {"model.inputs": {"pixel_values": {"dtype": "parameters", "shape": ["micro_batch", channels, *extents]}}}


def drawn_job(model_type: str, rng: random.Random) -> Job:
    """A job of a drawn model. Raises what transformers or bf16prof refuses."""
    work: dict[str, Any] = {
        "data": "synthetic", "sequence_length": rng.choice((48, 64, 100)), "micro_batch_size": rng.choice((1, 2)),
        "activation_checkpointing": rng.random() < 0.25, "gradient_accumulation_steps": rng.choice((1, 1, 2)),
        "keeps_outputs": rng.random() < 0.5,
    }  # fmt: skip
    sets: dict[str, Any] = {"model.hf_config": configuration(model_type, rng), "optimizer.torch_adam": False, "optimizer.fused": False}
    sets |= {f"workload.{key}": value for key, value in work.items()} | _images(model_type)
    profile = load_profile("cpu-demo", [Override(key, value, "drawn") for key, value in sets.items()]).profile
    stage, world = rng.choice((1, 2, 3, 3)), rng.choice((1, 2, 8))
    return admit(expand(Selection(profile, [stage], [world], [rng.choice(RECIPES)], Device.GPU, find_gpu("h100-80gb"))))[0][0]
