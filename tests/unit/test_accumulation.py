"""Where autograd adds in place: the dry run's answer against what PyTorch does with plain
tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.nn.functional as F
from torch.profiler import profile
from bf16prof.dry_run import accumulation

CASES = {
    "two products of one tensor": lambda x, w: ((x * 2) * 3 * ((x * 2) * 5)).sum(),
    "linear layers over rows of sequences": lambda x, w: (lambda h: (F.linear(h, w) * F.linear(h, w + 1)).sum())(x * 2),
    "a weight used twice": lambda x, w: (F.linear(x, w) * F.linear(x * 2, w)).sum(),
    "views of one tensor": lambda x, w: (lambda h: (h.view(-1) * 3).sum() + (h.view(-1, 8) * 4).sum())(x * 2),
    "three of one": lambda x, w: (lambda h: ((h * 3) * (h * 4) + h.exp()).sum())(x * 2),
    "a residual": lambda x, w: (lambda h: (h + F.silu(h)).sum())(x * 2),
}
leaves = lambda device: (torch.randn(2, 4, 8, requires_grad=True, device=device), torch.randn(8, 8, requires_grad=True, device=device))
real = {}
for name, run in CASES.items():
    loss = run(*leaves("cpu"))
    with profile() as profiler:
        loss.backward()
    real[name] = {event.key: event.count for event in profiler.key_averages() if event.key in ("aten::add", "aten::add_")}
seen = []
real_see = accumulation.InPlaceSums.see
def see(self, func, args):
    found = real_see(self, func, args)
    if func is accumulation.ADD and torch._C._current_graph_task_id() != -1:
        seen.append(found)
    return found
accumulation.InPlaceSums.see = see
from bf16prof.profiles.gpus import find_gpu
from bf16prof.dry_run.tracker import GPU
from bf16prof.dry_run.world import world
dry = {}
with world(1, find_gpu("a100-80gb")):
    for name, run in CASES.items():
        loss = run(*leaves(GPU))
        seen.clear()
        loss.backward()
        dry[name] = {"aten::add": seen.count(False), "aten::add_": seen.count(True)}
print("\\n" + json.dumps([real, dry]))
"""


def test_the_dry_run_adds_in_place_where_pytorch_does() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    real, dry = json.loads(run.stdout.strip().splitlines()[-1])

    for name, counts in real.items():
        counted: dict[str, Any] = {key: count for key, count in dry[name].items() if count}
        assert counted == counts, name
    assert sum(counts.get("aten::add_", 0) for counts in real.values()) >= 3
    assert sum(counts.get("aten::add", 0) for counts in real.values()) >= 3


@pytest.mark.parametrize("elements", [4, 5])
def test_the_random_numbers_of_a_gpu(elements: int) -> None:
    """`torch.manual_seed(42); torch.randn(5, device="cuda")`, as PyTorch's users print it."""
    from bf16prof.check.philox import Generator

    expected = [0.1940, 2.1614, -0.1721, 0.8491, -1.9244]
    assert [round(float(each), 4) for each in Generator(42, 108).normal(elements)] == expected[:elements]
