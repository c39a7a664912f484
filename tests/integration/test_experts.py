"""Real gloo ranks with experts of their own, and the dry run of one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Measured

pytestmark = [pytest.mark.timeout(600), pytest.mark.nightly]

CASES = [
    pytest.param("--model mixture:over_two --num-gpus 2 --ep 2", 2, id="zero2"),
    pytest.param("--model mixture:over_two --num-gpus 4 --ep 2 --gas 2", 1, id="zero1-on-four"),
    pytest.param("--model mixture:two_of_two --num-gpus 4 --ep 2", 2, id="two-experts-for-a-token"),
    pytest.param("--model mixture:over_two --num-gpus 2 --ep 2", 0, id="zero0"),
]

NUMBER_BYTES = 8
"""A Python number that a tensor with a gradient is multiplied by: autograd keeps it as a tensor of
the host, which a dry run never sees. The loss is one of those products; of each layer, one for one
expert for each token and two for two (moe/sharded_moe.py, l_aux)."""


@pytest.mark.parametrize(("words", "stage"), CASES)
def test_ranks_with_experts_of_their_own_hold_what_the_dry_run_says(words: str, stage: int, measured: Callable[..., Measured]) -> None:
    done = measured("--zero", str(stage), "--recipe", "bf16-fp32-master", *words.split(), "--simulate")
    measurement, dry = (done.finished.record(source, stage, "bf16-fp32-master") for source in ("measure", "simulate"))

    assert measurement["case"]["expert_parallel"] == 2
    assert any("room for 1.5 x" in note for note in dry["notes"])
    _require_exchanges(dry)
    assert measurement["components"] == dry["components"]
    numbers = NUMBER_BYTES * (5 if "two_of" in words else 3)
    for phase, memory in done.quickest(stage, "bf16-fp32-master").items():
        found = dry["phases"][phase]
        assert memory.end_bytes - found["end_bytes"] == (numbers if phase == "forward" else 0), phase
        assert memory.peak_bytes is not None
        assert 0 <= memory.peak_bytes - found["peak_bytes"] <= numbers, phase


def _require_exchanges(record: dict[str, Any]) -> None:
    """Out to the experts and back, for two layers, in forward and again in backward; room for 1.5
    times the share of a token's experts."""
    said, k = record["workload"], 2 if "two_of" in record["workload"]["model"] else 1
    tokens = said["micro_batch_size"] * said["sequence_length"]
    room = -(-3 * k * tokens // (2 * 4))
    once = 2 * 2 * 4 * room * 30 * 2 * said["gradient_accumulation_steps"]

    assert {each["phase"]: each["size_bytes"] for each in record["exchanges"]} == {"forward": once, "backward": once}
