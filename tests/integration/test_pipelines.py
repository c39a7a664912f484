"""Real gloo ranks of a pipeline, and one dry run per stage: the same bytes on every stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Measured

pytestmark = pytest.mark.timeout(600)

GPT2 = "--set model.family=gpt2"
NUMBER_BYTES = 4
"""gloo may hold a number that was reduced a moment longer."""

COUNTS_BYTES = 16
"""Two numbers of parameters that the engine adds up over the stages: a dry run counts the list's
tensor beside the one that is reduced."""

CASES = [
    pytest.param(f"{GPT2} --num-gpus 2 --pp 2 --gas 3", 1, id="tied"),
    pytest.param(f"{GPT2} --num-gpus 4 --pp 2 --gas 4", 1, id="tied-twice", marks=pytest.mark.nightly),
    pytest.param(f"{GPT2} --num-gpus 4 --pp 4 --gas 6", 0, id="four-stages", marks=pytest.mark.nightly),
    pytest.param(
        "--set model.family=llama --set model.hidden_size=64 --num-gpus 2 --pp 2 --gas 2 --activation-checkpointing",
        0,
        id="checkpoints",
        marks=pytest.mark.nightly,
    ),
    pytest.param("--num-gpus 4 --pp 2 --gas 2", 1, id="two-replicas", marks=pytest.mark.nightly),
    pytest.param("--model stages:layers --num-gpus 2 --pp 2 --gas 2", 1, id="two-tensors", marks=pytest.mark.nightly),
    pytest.param("--model stages:module --num-gpus 2 --pp 2 --gas 2", 0, id="own-module", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("words", "stage"), CASES)
def test_stages_hold_what_their_dry_runs_say(words: str, stage: int, measured: Callable[..., Measured]) -> None:
    done = measured("--zero", str(stage), "--recipe", "bf16-fp32-master", *words.split(), "--simulate")
    measurement, dry = (done.finished.record(source, stage, "bf16-fp32-master") for source in ("measure", "simulate"))

    case = measurement["case"]
    assert case["pipeline_parallel"] > 1
    assert len(dry["ranks"]) == case["pipeline_parallel"]
    assert measurement["parameters"] == dry["parameters"]
    held = {rank["rank"]: rank for rank in measurement["ranks"]}
    for rank in dry["ranks"]:
        assert held[rank["rank"]]["allocated_bytes"] == rank["allocated_bytes"], rank["host"]
        assert 0 <= held[rank["rank"]]["peak_allocated_bytes"] - rank["peak_allocated_bytes"] <= NUMBER_BYTES, rank["host"]
    assert measurement["components"] == dry["components"]
    assert measurement["components"].get("other", 0) == 0
    for phase, memory in measurement["phases"].items():
        assert dry["phases"][phase]["end_bytes"] == memory["end_bytes"], phase
        twice = COUNTS_BYTES if phase == "init" else 0
        assert -NUMBER_BYTES <= dry["phases"][phase]["peak_bytes"] - memory["peak_bytes"] <= twice, phase
