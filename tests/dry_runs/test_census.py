"""A short form of the census (`make operators`): operators drawn from PyTorch's database, and those
that once were wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from operator_pages import cpu_page, cpu_table, cuda_section, findings

pytest.importorskip("expecttest", reason="PyTorch's database of operators needs it")
pytestmark = [pytest.mark.timeout(280), pytest.mark.xdist_group("census")]

ROOT = Path(__file__).parents[2]

ONCE_WRONG = (
    "nn.functional.mse_loss", "nn.functional.smooth_l1_loss", "nn.functional.soft_margin_loss", "nn.functional.embedding_bag",
    "nn.functional.conv1d", "index_select", "max.reduction_with_dim", "module LSTM", "module GRU", "module Conv2d",
)  # fmt: skip
ALIKE = (
    "add", "mul", "gather", "softmax", "nn.functional.layer_norm", "nn.functional.gelu", "nn.functional.nll_loss", "sum", "mean", "cat",
    "nn.functional.huber_loss", "nn.functional.group_norm", "nn.functional.max_pool2d", "topk", "sort", "var", "where", "bmm", "linalg.qr",
)  # fmt: skip
LSTM_BACKWARD = 0.005
"""oneDNN's backward gives two gradients of a bias where fake tensors give one: 48 bytes of these
samples' peaks."""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    drawn = random.Random(11).sample(ALIKE, 5)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("census.py")), *ONCE_WRONG, *drawn], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert [row["name"] for row in found] == [*ONCE_WRONG, *drawn]
    return found


def test_real_kernels_and_the_dry_run_agree_in_every_byte(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["samples"], row
        for sample in row["samples"]:
            allowed = LSTM_BACKWARD if row["name"] == "module LSTM" else 0.0
            *rest, last = zip(sample["real"], sample["dry"], strict=True)
            assert all(real == dry for real, dry in rest), (row["name"], sample)
            assert abs(last[0] - last[1]) <= allowed * last[0], (row["name"], sample)


def test_the_shipped_table_agrees_with_what_is_found_now(rows: list[dict[str, Any]]) -> None:
    """An operator that the table calls exact is exact, and one that it has asked says the truth
    when it is asked."""
    from bf16prof.profiles.shipped import shipped_table

    table = shipped_table("cpu-operators.toml", "bf16prof.dry_run.hardware")
    found = findings(rows)
    assert set(found.of_state("exact")) <= {*table["exact"], *table["refused"], *table["asked"], *table["listed"]}
    assert not set(found.of_state("asked")) & {*table["exact"]}
    assert not set(found.of_state("listed")) - {*table["listed"]}


def test_one_that_dies_or_never_ends_does_not_end_the_census(monkeypatch: pytest.MonkeyPatch) -> None:
    import census

    def odd(name: str, probe: object, *, asks_all: bool) -> dict[str, Any]:
        import os
        import time

        if name == "dies":
            os._exit(3)
        if name == "never ends":
            time.sleep(60)
        return {"name": name, "samples": [], "operators": {}}

    monkeypatch.setattr(census, "census", odd)
    monkeypatch.setattr(census, "names", list)
    found = {row["name"]: row.get("error") for row in census.run(["dies", "never ends", "add"], seconds=3)}
    assert found == {"dies": "the process died", "never ends": "not done in 3 s", "add": None}


def test_pages_are_made_of_rows() -> None:
    row = {
        "name": "odd",
        "samples": [{"sample": 0, "dtype": "torch.float32", "real": [8, 8], "dry": [8, 12]}],
        "operators": {"aten.odd.default": {"calls": 2, "wrong": 1, "wrong when asked": 1, "worst": [[8, 0], [8, 4], [8, 0]]}},
    }
    found = findings([row])
    assert '"odd.default" = "some scratch memory' in cpu_table(found, "2.13.0+cpu")
    assert "| `odd` | 8, 8 | 8, 12 |" in cpu_page(found, "2.13.0+cpu")


def test_the_page_about_cuda_shows_the_registry() -> None:
    page = (ROOT / "docs" / "cuda-operators.md").read_text(encoding="utf-8")
    assert cuda_section() in page, "put the output of operator_pages.cuda_section() there"
