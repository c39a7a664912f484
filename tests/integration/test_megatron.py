"""The recipes that describe Megatron-LM against megatron-core's own buffers and optimizers, on two gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bf16prof.profiles.recipes import find_recipe

RANKS = 2

Held = dict[tuple[bool, bool], dict[str, float]]
"""Bytes per parameter by component, by whether gradients are fp32 and whether the optimizer is distributed."""


@pytest.fixture(scope="module")
def held() -> Held:
    """What is held after a step."""
    pytest.importorskip("megatron.core")
    script = Path(__file__).with_name("megatron_rank.py")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(fp32, cut): sizes for fp32, cut, sizes in json.loads(done.stdout.splitlines()[-1])}


def described(recipe: str, *, over: int = 1) -> dict[str, float]:
    """What a recipe says, of which there are so many parts where it is cut."""
    found = find_recipe(recipe)
    return {name: size / (over if name in found.partitioned else 1) for name, size in found.bytes_per_parameter().items() if size}


def test_it_holds_eighteen_bytes_a_parameter(held: Held) -> None:
    assert held[True, False] == described("megatron-bf16")
    assert sum(held[True, False].values()) == 18


def test_its_distributed_optimizer_cuts_what_the_recipe_says(held: Held) -> None:
    assert held[True, True] == described("megatron-bf16", over=RANKS)
    assert sum(held[True, True].values()) == 6 + 12 / RANKS


def test_bf16_gradients_cost_more_than_the_thread_counts(held: Held) -> None:
    """The optimizer makes fp32 gradients of them, and has those until the next `zero_grad`: 20 bytes between steps, not 16."""
    assert held[False, False] == {**described("nemo-bf16"), "master_gradients": 4}
    assert sum(held[False, True].values()) == 4 + 16 / RANKS
