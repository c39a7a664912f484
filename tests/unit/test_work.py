"""Operations of a step: against a published count, PaLM's formula and PyTorch's own counter over
our modules."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from jobs import SMALL_MODEL, job, profile, small_profile, step_work
from torch.utils.flop_counter import FlopCounterMode

from bf16prof.models.modules import build
from bf16prof.models.shapes import inventory
from bf16prof.profiles.models import ModelSettings
from bf16prof.profiles.schema import Profile
from bf16prof.vocabulary import Device

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2-untied": {"family": "gpt2", "tie_embeddings": False, "intermediate_size": 41},
    "llama": {"family": "llama", "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 41},
    "llama-tied": {"family": "llama", "hidden_size": 24, "num_heads": 4, "num_kv_heads": 1, "tie_embeddings": True},
    "transformer-postln": {},
}


def _small(name: str, checkpointing: bool) -> Profile:
    small = small_profile({**SMALL_MODEL, **FAMILIES[name]})
    return small.model_copy(update={"workload": small.workload.model_copy(update={"activation_checkpointing": checkpointing})})


def test_gpt2_small_is_as_in_nanogpts_notebook() -> None:
    """nanoGPT's transformer_sizing.ipynb (github.com/karpathy/nanoGPT), GPT-2 124M at 1024 tokens:
    forward_total, backward_total, total."""
    settings = profile("gpu-check", workload__micro_batch_size=1, workload__sequence_length=1024)

    work = step_work(job(settings, 0, 1))

    assert work.forward_flops == 291_648_307_200
    assert work.backward_flops == 583_296_614_400
    assert work.model_flops == 874_944_921_600


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "gpt2-xl", "deepspeed-bf16-example"])
def test_operations_per_token_are_palms(name: str) -> None:
    """6 N + 12 L H Q T (arXiv 2204.02311, appendix B), N over all matrices that tokens are
    multiplied by: no norms, biases, lookups."""
    settings = profile(name)
    model, tokens = settings.model, settings.workload.sequence_length
    assert isinstance(model, ModelSettings)
    tables = {"wpe.weight", "pos_embedding.weight", "embedding.weight", "embed_tokens.weight"}
    matrices = sum(p.numel for p in inventory(model) if len(p.shape) == 2 and p.name not in tables)

    work = step_work(job(settings))

    width = model.hidden_size // model.num_heads
    assert work.model_flops / work.tokens == (6 * matrices + 12 * model.num_layers * model.num_heads * width * tokens)


@pytest.mark.parametrize(("name", "checkpointing"), list(itertools.product(FAMILIES, (False, True))))
def test_pytorch_counts_the_same(name: str, checkpointing: bool) -> None:
    """On the meta device attention is taken apart into its matrix products, so that the counter
    sees each of them."""
    settings = _small(name, checkpointing)
    with torch.device("meta"):
        module = build(settings.model, activation_checkpointing=checkpointing)
    tokens = torch.zeros(settings.workload.micro_batch_size, settings.workload.sequence_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as forward:
        logits = module(tokens)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()

    work = step_work(job(settings, 0, 1, "fp32", device=Device.CPU))

    assert work.forward_flops == forward.get_total_flops()
    assert work.backward_flops + work.recomputed_flops == backward.get_total_flops()
    assert bool(work.recomputed_flops) is checkpointing


@pytest.mark.parametrize("name", FAMILIES)
def test_operations_do_not_depend_on_kernels_and_dtypes(name: str) -> None:
    """CPU and H100 attend with different kernels; casts and copies are no matrix products."""
    settings = _small(name, True)
    jobs = [job(settings, 2, 2, recipe) for recipe in ("fp32", "bf16-fp32-master", "autocast-fp32")]
    jobs.append(job(settings, 2, 2, device=Device.CPU))

    assert len({(work.forward_flops, work.backward_flops, work.recomputed_flops) for work in map(step_work, jobs)}) == 1
