"""ZeRO++'s secondary partitions (hpZ) on four real ranks, and the dry run of the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Measured

pytestmark = [pytest.mark.timeout(600), pytest.mark.nightly]

LAYERS, NUMBER_BYTES = 3, 8
"""Attention multiplies by a number, which autograd keeps as a tensor of the host; a dry run never
sees it."""


def test_ranks_that_share_a_second_copy_hold_what_the_dry_run_says(measured: Callable[..., Measured]) -> None:
    key = "deepspeed.zero_optimization.zero_hpz_partition_size=2"
    done = measured("--zero", "3", "--recipe", "bf16-fp32-master", "--num-gpus", "4", "--set", key, "--simulate")
    measurement, dry, estimate = (done.finished.record(source, 3, "bf16-fp32-master") for source in ("measure", "simulate", "estimate"))

    assert measurement["components"] == dry["components"] == estimate["components"]
    assert "parameters: secondary partitions" in dry["timeline"]["names"]  # each step drops them (zero/stage3.py)
    for phase, memory in done.quickest(3, "bf16-fp32-master").items():
        assert memory.peak_bytes is not None
        assert 0 <= memory.peak_bytes - dry["phases"][phase]["peak_bytes"] <= LAYERS * NUMBER_BYTES, phase
