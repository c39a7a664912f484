"""Real DeepSpeed ranks that do more than steps of one model, and the dry run of the same:
evaluation, packed rows, DPO, reward models, QLoRA, tiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Measured
from hugging_face import config

pytestmark = [pytest.mark.timeout(600), pytest.mark.nightly]

LOGITS = "--eval-batch-size 3 --set workload.evaluation.prediction_loss_only=false --set workload.evaluation.batches=3"
LORA = "--lora r=4,targets=all-linear"
SCALAR = 8
"""What PyTorch makes of a Python number beside a tensor, which only real ranks count: the scaling
of an adapter, the loss of a pair."""

CASES = [
    pytest.param(0, "--eval-batch-size 3", 0, id="evaluation-zero0"),
    pytest.param(3, LOGITS, SCALAR, id="logits-zero3"),
    pytest.param(2, f"--packed-sequences 4 {LOGITS}", 0, id="packed-zero2"),
    pytest.param(3, "--dpo reference", SCALAR, id="dpo-zero3"),
    pytest.param(2, "--dpo reference --gas 2", SCALAR, id="dpo-zero2"),
    pytest.param(2, "--dpo reference --lora r=4,targets=q_proj", 3 * SCALAR, id="dpo-adapter-zero2"),
    pytest.param(1, "--dpo precomputed", SCALAR, id="dpo-precomputed-zero1"),
    pytest.param(3, "--reward", SCALAR, id="reward-zero3"),
    pytest.param(1, "--reward --gas 2 --activation-checkpointing", SCALAR, id="reward-zero1"),
    pytest.param(2, f"{LORA} --load-in-4bit --eval-batch-size 3", 14 * SCALAR, id="qlora-zero2"),
    pytest.param(3, f"{LORA} --load-in-4bit --no-zero-init", 14 * SCALAR, id="qlora-zero3"),
    pytest.param(3, "--fused-loss tiled --set workload.fused_loss_tiles=3", SCALAR, id="tiles-zero3"),
    pytest.param(1, "--fused-loss tiled --set workload.fused_loss_tiles=3 --gas 2", 0, id="tiles-zero1"),
    pytest.param(2, "--set optimizer.library=ademamix-8bit", 0, id="ademamix-zero2"),
]
"""Stage, what else is said, and how many bytes more a peak or an end on real ranks may have."""


@pytest.mark.parametrize(("stage", "more", "scalars"), CASES)
def test_ranks_hold_what_the_dry_run_says(stage: int, more: str, scalars: int, measured: Callable[..., Measured], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")
    said = ("--hf-config", str(file), "--zero", str(stage), "--recipe", "bf16-fp32-master", *more.split(), "--simulate")

    done = measured(*said)
    measurement, dry = (done.finished.record(source, stage, "bf16-fp32-master") for source in ("measure", "simulate"))

    assert measurement["components"] == dry["components"]
    assert measurement["components"].get("other", 0) == 0
    assert measurement["allocated_bytes"] == dry["allocated_bytes"]
    assert measurement["phases"].keys() == dry["phases"].keys()
    for phase in measurement["phases"].keys() - {"init", "step"}:  # init quantizes on a CPU; in the step gloo copies what it gathers
        for instant in ("peak_bytes", "end_bytes"):
            assert 0 <= measurement["phases"][phase][instant] - dry["phases"][phase][instant] <= scalars, (phase, instant)
