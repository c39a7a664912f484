"""Operations of a step: against a published count, PaLM's formula and PyTorch's own counter over our modules."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from jobs import model_settings, profile
from torch.utils.flop_counter import FlopCounterMode

from bf16prof.estimate.work import micro_step_flops
from bf16prof.models.modules import build
from bf16prof.models.shapes import inventory
from bf16prof.profiles.models import ModelSettings

BATCH, SEQUENCE = 2, 7
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2-untied": {"family": "gpt2", "tie_embeddings": False, "intermediate_size": 41},
    "llama": {"family": "llama", "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 41},
    "llama-tied": {"family": "llama", "hidden_size": 24, "num_heads": 4, "num_kv_heads": 1, "tie_embeddings": True},
    "transformer-postln": {},
}


def test_gpt2_small_is_as_in_nanogpts_notebook() -> None:
    """nanoGPT's transformer_sizing.ipynb (github.com/karpathy/nanoGPT), GPT-2 124M at 1024 tokens: forward_total, backward_total, total."""
    model = profile("gpu-check").model
    assert isinstance(model, ModelSettings)

    flops = micro_step_flops(model, 1, 1024, False, True)

    assert flops.forward == 291_648_307_200
    assert flops.backward == 583_296_614_400
    assert flops.forward + flops.backward == 874_944_921_600


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "gpt2-xl", "deepspeed-bf16-example"])
def test_operations_per_token_are_palms(name: str) -> None:
    """6 N + 12 L H Q T (arXiv 2204.02311, appendix B), N over all matrices that tokens are multiplied by: no norms, biases, lookups."""
    settings = profile(name)
    model, tokens = settings.model, settings.workload.sequence_length
    assert isinstance(model, ModelSettings)
    tables = {"wpe.weight", "pos_embedding.weight", "embedding.weight", "embed_tokens.weight"}
    matrices = sum(p.numel for p in inventory(model) if len(p.shape) == 2 and p.name not in tables)

    flops = micro_step_flops(model, 1, tokens, True, True)

    width = model.hidden_size // model.num_heads
    assert flops.forward + flops.backward == tokens * (6 * matrices + 12 * model.num_layers * model.num_heads * width * tokens)


@pytest.mark.parametrize(("name", "checkpointing"), list(itertools.product(FAMILIES, (False, True))))
def test_pytorch_counts_the_same(name: str, checkpointing: bool) -> None:
    """On the meta device attention is taken apart into its matrix products, so that the counter sees each of them."""
    model = model_settings(**FAMILIES[name])
    with torch.device("meta"):
        module = build(model, activation_checkpointing=checkpointing)
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as forward:
        logits = module(tokens)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()

    flops = micro_step_flops(model, BATCH, SEQUENCE, checkpointing, True)

    assert flops.forward == forward.get_total_flops()
    assert flops.backward + flops.recomputed == backward.get_total_flops()
    assert bool(flops.recomputed) is checkpointing
