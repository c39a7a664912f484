"""Real DeepSpeed ranks that train an adapter, and the dry run of the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Measured
from hugging_face import config

pytestmark = pytest.mark.timeout(600)


def test_inside_zero_init_an_adapter_stays_in_fp32_and_every_byte_is_found(measured: Callable[..., Measured], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")
    said = (
        "--hf-config",
        str(file),
        "--zero",
        "3",
        "--recipe",
        "bf16-fp32-master",
        "--lora",
        "r=8,targets=q_proj+v_proj",
        "--eval-batch-size",
        "3",
        "--simulate",
    )

    done = measured(*said)
    measurement, dry = (done.finished.record(source, 3, "bf16-fp32-master") for source in ("measure", "simulate"))

    assert measurement["components"] == dry["components"]
    assert measurement["components"].get("other", 0) == 0
    assert measurement["allocated_bytes"] == dry["allocated_bytes"]
    assert measurement["phases"]["eval"] == dry["phases"]["eval"]
    for phase in ("forward", "backward"):
        assert dry["phases"][phase]["peak_bytes"] == pytest.approx(measurement["phases"][phase]["peak_bytes"], rel=0.001), phase
    held = {item["name"]: item["bytes"] for item in measurement["items"]}
    layers, hidden, heads, kv_heads, head = 2, 48, 4, 2, 6
    adapter = layers * 8 * (hidden + heads * head + hidden + kv_heads * head)
    assert held["flat parameters"] == 4 * adapter // 2, "fp32, a half for each of two ranks"
    gloos_copies = measurement["phases"]["step"]["peak_bytes"] - dry["phases"]["step"]["peak_bytes"]
    assert 0 <= gloos_copies <= 4 * adapter, "of parameters that are gathered again, as many as are under way at the same time"
    assert held["gradient partition"] == 2 * adapter // 2
    assert measurement["workload"]["adapter"] == "LoRA r=8 on q_proj, v_proj"
