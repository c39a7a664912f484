"""Several dry runs of which one fails: the right one is named, the records of the others are shown
and written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from harness import bf16prof

pytestmark = pytest.mark.timeout(600)

MODEL = """
import os, signal
import torch.distributed as dist
from torch import nn


def crashes():
    if dist.get_world_size() == 4:
        os.kill(os.getpid(), signal.SIGSEGV)
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))


def raises():
    if dist.get_world_size() == 2:
        raise ValueError("no such thing")
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
"""


@pytest.mark.parametrize(("name", "world", "code", "said"), [
    ("crashes", 4, 3, "killed by SIGSEGV"), ("raises", 2, 2, "ValueError: no such thing"),
])  # fmt: skip
def test_one_of_three_fails(tmp_path: Path, name: str, world: int, code: int, said: str) -> None:
    (tmp_path / "brittle.py").write_text(MODEL, encoding="utf-8")
    profile = tmp_path / "brittle.toml"
    profile.write_text(
        f'[model]\nfactory = "brittle:{name}"\nvocab_size = 50\n[workload]\nsequence_length = 8\nmicro_batch_size = 2\n', encoding="utf-8"
    )
    file = tmp_path / "records.json"
    words = ("simulate", "--profile", str(profile), "--zero", "2", "--gpus", "1,2,4", "--recipe", "bf16-fp32-master", "-o", str(file))

    done = bf16prof(*words, env={"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])})

    label = f"zero2-w{world}-bf16-fp32-master"
    assert done.code == code
    assert f"the dry run of {label} failed: " in done.stderr or f"{label}: " in done.stderr
    assert said in done.stderr
    document = json.loads(file.read_text(encoding="utf-8"))
    dry = [record["case"]["world_size"] for record in document["records"] if record["source"] == "simulate"]
    assert sorted(dry) == sorted({1, 2, 4} - {world})
    assert [refusal["case"]["world_size"] for refusal in document["refused"]] == [world]
    assert said in document["refused"][0]["reason"]
