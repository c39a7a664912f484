"""The closed form beside the record of a script: of the model's own configuration, and of what its
engine was given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bf16prof.commands.flags import COMMANDLINE, DEFAULT, Asked, EstimateFlags
from bf16prof.errors import Bf16profError, InputError
from bf16prof.files import write_json
from bf16prof.records import MemoryRecord
from bf16prof.scratch import temporary_folder
from bf16prof.scripts.described import Described
from bf16prof.vocabulary import Device


def with_estimate(record: MemoryRecord, found: Described, gpu: str) -> list[MemoryRecord]:
    """The record and the estimate of its case, or the record with a note that says why there is
    none."""
    estimate, why_not = script_estimate(record, found, gpu)
    if estimate is not None:
        return [record, estimate]
    return [dataclasses.replace(record, notes=(*record.notes, why_not)) if why_not else record]


def script_estimate(record: MemoryRecord, found: Described, gpu: str) -> tuple[MemoryRecord | None, str]:
    """The estimate of the same case, or why there is none, if that is known. `gpu`: by which a
    record on a GPU is judged."""
    if found == Described():
        return None, ""
    try:
        return _estimate(record, found, gpu), ""
    except Bf16profError as error:
        return None, f"no estimate beside {record.case.label}: {error.message}"


def _estimate(record: MemoryRecord, found: Described, gpu: str) -> MemoryRecord:
    from bf16prof.commands.estimate import estimated
    from bf16prof.commands.request import read_request

    workload = record.workload
    if workload is None or found.hf_config is None or found.why_not:
        raise InputError(found.why_not or "nobody said what it trains")
    if not record.case.parallelism.is_data_only:
        raise InputError(f"ranks share its work: {record.case.parallelism.words}")
    with temporary_folder() as folder:
        said = _said(record, found, gpu, folder)
        names = [each.name for each in dataclasses.fields(EstimateFlags)]
        asked = Asked("estimate", EstimateFlags(**said), {name: COMMANDLINE if name in said else DEFAULT for name in names})
        (estimate,) = estimated(asked, read_request(asked)).records
    if None not in (estimate.parameters, record.parameters) and estimate.parameters != record.parameters:
        raise InputError(f"its configuration has {estimate.parameters:,} parameters, the script's model {record.parameters:,}")
    note = "of the model's configuration and of what the script's engine was given; a script's own tensors and masks are not in it"
    return dataclasses.replace(estimate, case=record.case, notes=(*estimate.notes, note))


def _said(record: MemoryRecord, found: Described, gpu: str, folder: Path) -> dict[str, Any]:
    """The flags of `estimate` that say what the record says."""
    workload, case = record.workload, record.case
    assert workload is not None, "looked at before"
    write_json(folder / "config.json", found.hf_config)
    write_json(folder / "deepspeed.json", dict(workload.deepspeed))
    said: dict[str, Any] = {
        "hf_config": folder / "config.json",
        "ds_config": folder / "deepspeed.json",
        "zero": str(case.zero_stage),
        "gpus": str(case.world_size),
        "device": record.device,
        "micro_batch_size": workload.micro_batch_size,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps,
        "activation_checkpointing": workload.activation_checkpointing,
        "zero_init": workload.zero_init,
        "set_": [f"workload.keeps_outputs={str(workload.keeps_outputs).lower()}"],
        "quiet": True,
    }
    optional = {"sequence_length": workload.sequence_length, "optim": found.optim, "gpu": gpu if record.device is Device.GPU else None}
    if "autocast" in case.recipe:  # the script's own, of which DeepSpeed's JSON says nothing
        optional["recipe"] = case.recipe
    return said | {name: value for name, value in optional.items() if value is not None}
