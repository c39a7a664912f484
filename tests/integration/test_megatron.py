"""megatron-core's engine on real gloo ranks: the bytes that the recipes, the closed form and the
dry run say."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Measured

from bf16prof.profiles.recipes import find_recipe
from bf16prof.vocabulary import Component, Phase

pytestmark = pytest.mark.timeout(600)

LAYERS, NUMBER_BYTES = 3, 8
"""Attention multiplies by a number, which autograd keeps as a tensor of the host; a dry run never
sees it."""

GROUPS = [(None, False), ((("wd_mult", 0.0),), False)]
"""What ranks tell each other of their groups of parameters in init (core/optimizer/__init__.py,
_get_param_groups). gloo's threads may hold it for a moment, while the optimizer is made."""

LLAMA = Path(__file__).parents[1] / "data" / "hf-llama.json"

CASES = [
    pytest.param("--num-gpus 1 --recipe megatron-bf16 --quality 2", 0, "megatron-bf16", id="18-bytes", marks=pytest.mark.nightly),
    pytest.param("--num-gpus 2 --recipe nemo-bf16 --gas 3", 1, "nemo-bf16", id="bf16-gradients-distributed"),
    pytest.param("--num-gpus 2 --recipe megatron-bf16", 1, "megatron-bf16", id="distributed", marks=pytest.mark.nightly),
    pytest.param("--num-gpus 2 --recipe nemo-bf16 --activation-checkpointing", 0, "nemo-bf16", id="checkpoints", marks=pytest.mark.nightly),
    pytest.param(
        "--num-gpus 4 --recipe megatron-bf16 --set model.family=gpt2", 1, "megatron-bf16", id="tied-four-ranks", marks=pytest.mark.nightly
    ),
    pytest.param(f"--num-gpus 2 --recipe nemo-bf16 --hf-config {LLAMA}", 0, "nemo-bf16", id="llama", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("words", "stage", "recipe"), CASES)
def test_ranks_hold_what_all_sources_say(words: str, stage: int, recipe: str, measured: Callable[..., Measured]) -> None:
    pytest.importorskip("megatron.core")
    done = measured("--engine", "megatron-core", "--zero", str(stage), *words.split(), "--simulate")
    measurement, dry, estimate = (done.finished.record(source, stage, recipe) for source in ("measure", "simulate", "estimate"))

    assert measurement["components"] == dry["components"] == estimate["components"]
    assert measurement["allocated_bytes"] == dry["allocated_bytes"] == estimate["allocated_bytes"]
    assert measurement["components"].get("other", 0) == 0
    fullest = max(measurement["ranks"], key=lambda rank: rank["allocated_bytes"])["rank"] if measurement["ranks"] else 0
    for phase, memory in done.quickest(stage, recipe, fullest).items():
        assert memory.peak_bytes is not None
        kept = measurement["case"]["world_size"] * len(pickle.dumps(GROUPS)) if phase is Phase.INIT else 0
        assert 0 <= memory.peak_bytes - dry["phases"][phase]["peak_bytes"] <= LAYERS * NUMBER_BYTES + kept, phase
    if stage == 0 and "--hf-config" not in words:  # the distributed optimizer's buffers are padded, and that model has buffers of its own
        _is_as_the_recipe_says(measurement, recipe)
    if "--quality" in words:
        _nothing_is_lost(measurement)


def _is_as_the_recipe_says(record: dict[str, Any], id_: str) -> None:
    """Bytes per parameter: those of the recipe, and with bf16 gradients the fp32 copies that stay
    until the next step begins."""
    sizes = find_recipe(id_).bytes_per_parameter() | ({str(Component.MASTER_GRADIENTS): 4} if id_ == "nemo-bf16" else {})
    assert {name: size * record["parameters"] for name, size in sizes.items()} == {name: record["components"][name] for name in sizes}


def _nothing_is_lost(record: dict[str, Any]) -> None:
    """What torch's AdamW does to fp32 master parameters is what was intended."""
    last = record["quality"][-1]
    assert last["total"]["elements"] == record["parameters"]
    assert last["total"]["edq"] == pytest.approx(1, abs=1e-4)
    assert {name for name, found in last["casts"].items() if found["values"]} == {"weights", "gradients", "updates"}
