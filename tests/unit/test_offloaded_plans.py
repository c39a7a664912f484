"""Plans over a DeepSpeed JSON that offloads: what it says of files stays, and the next command says
what the plan decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused

__all__ = ["main"]


def written(folder: Path, **optimizer: Any) -> Path:
    content = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3, "offload_optimizer": optimizer},
    }
    (folder / "theirs.json").write_text(json.dumps(content))
    return folder / "theirs.json"


ASKED = ("plan", "cpu-demo", "--gpus", "8", "--gpu", "h100-80gb", "--zero", "3", "--recipe", "bf16-fp32-master", "--no-verify")


@pytest.mark.parametrize("offload", ["optimizer", "optimizer+parameters"])
def test_an_optimizer_in_files_is_not_planned_in_host_memory(offload: str, main: Main, tmp_path: Path) -> None:
    nvme = written(tmp_path, device="nvme", nvme_path="/local/me")

    said = refused(main(*ASKED, "--ds-config", nvme, "--offload", offload, "--write", tmp_path / "ds.json"))

    assert "an optimizer on NVMe (offload_optimizer.device) is left to the dry run" in said
    assert not (tmp_path / "ds.json").exists()


def test_what_offloads_nothing_names_no_files(main: Main, tmp_path: Path) -> None:
    nvme = written(tmp_path, device="nvme", nvme_path="/local/me")
    code, _, err = main(*ASKED, "--ds-config", nvme, "--offload", "none", "--write", tmp_path / "ds.json")

    assert code == 0
    assert "nvme_path" not in (tmp_path / "ds.json").read_text()
    assert "--offload none" in err, "simulate would offload as the file does"


def test_the_next_command_is_short_where_nothing_offloads(main: Main) -> None:
    _, _, err = main(*ASKED)

    assert "next: " in err
    assert "--offload" not in err
