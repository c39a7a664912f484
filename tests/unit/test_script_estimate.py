"""The closed form beside a script's record: of the model's configuration and of what the engine was
given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn, ops, zeros

import bf16prof
from bf16prof.commands.script_estimate import script_estimate
from bf16prof.dry_run.tracker import written
from bf16prof.profiles.shipped import preset_files, shipped_text
from bf16prof.records import Case, MemoryRecord, Workload
from bf16prof.scripts.described import Described, described
from bf16prof.scripts.workload import Calls
from bf16prof.vocabulary import Source

LLAMA: dict[str, Any] = json.loads(shipped_text(preset_files()["llama3.2-1b"]))["model"]["hf_config"]
"""A model whose passes come with the package."""
SETTINGS = {
    "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000},
}  # fmt: skip


def of_a_script(**changes: Any) -> MemoryRecord:
    """What a dry run records of a script, as far as an estimate asks."""
    (record,) = bf16prof.estimate("llama3.2-1b", gpus=4, gpu="h100", zero=2, recipe="bf16-fp32-master").records
    workload = Workload(
        "llama",
        512,
        3,
        2,
        activation_checkpointing=True,
        attention="sdpa",
        optimizer="AdamW (torch)",
        zero_init=False,
        keeps_outputs=False,
        deepspeed=SETTINGS,
    )
    case = Case("train.py", 2, 4, "bf16-fp32-master", workload="0123456789ab")
    return dataclasses.replace(record, case=case, source=Source.SIMULATE, workload=workload, parameters=None, **changes)


def test_the_estimate_is_that_of_the_same_job_typed_by_hand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "ds.json").write_text(json.dumps(SETTINGS))

    found, why_not = script_estimate(of_a_script(), Described(LLAMA, "adamw_torch"), "h100")

    (typed,) = bf16prof.estimate(
        str(tmp_path / "config.json"), ds_config=tmp_path / "ds.json", gpus=4, gpu="h100", sequence_length=512,
        activation_checkpointing=True, optim="adamw_torch",
    ).records  # fmt: skip
    assert found is not None, why_not
    assert found.case == of_a_script().case, "so that both stand side by side"
    assert (found.allocated_bytes, found.phases) == (typed.allocated_bytes, typed.phases)


@pytest.mark.parametrize(
    ("record", "found", "reason"),
    [
        (of_a_script(), Described(why_not="some of it is frozen"), "some of it is frozen"),
        (dataclasses.replace(of_a_script(), parameters=7), Described(LLAMA, "adamw_torch"), "parameters, the script's model 7"),
        (of_a_script(), Described(LLAMA | {"num_attention_heads": 0}, "adamw_torch"), "num_attention_heads"),
    ],
)
def test_where_there_is_none_the_reason_is_said(record: MemoryRecord, found: Described, reason: str) -> None:
    estimate, why_not = script_estimate(record, found, "h100")

    assert estimate is None
    assert why_not.startswith("no estimate beside zero2-w4-bf16-fp32-master: ")
    assert reason in why_not


def test_ranks_that_share_a_batch_have_none() -> None:
    record = of_a_script()
    shared = dataclasses.replace(record, case=dataclasses.replace(record.case, sequence_parallel=2))

    assert "ranks share its work: 2 data x 2 sequence" in script_estimate(shared, Described(LLAMA, "adamw_torch"), "h100")[1]


def test_a_model_of_ones_own_is_not_described() -> None:
    engine = SimpleNamespace(module=nn.Linear(2, 2))

    assert described(engine, Calls()).why_not == "Linear is no model of transformers"


def test_what_an_operator_writes_into() -> None:
    a, b, c = zeros(2, 2), zeros(2, 2), zeros(2, 2)

    assert [each is c for each in written(ops.aten.mm.out, (a, b), {"out": c})] == [True]
    assert [each is a for each in written(ops.aten.add_.Tensor, (a, b), {})] == [True]
    assert written(ops.aten.add.Tensor, (a, b), {}) == []
