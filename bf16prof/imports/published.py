"""Runs that others published as tables, as data files with their citation (`published/*.toml`); a command names one `published:NAME`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bf16prof.imports.finding import GIB, Finding, rounded
from bf16prof.imports.record import imported_record
from bf16prof.profiles.gpus import Gpu, find_gpu
from bf16prof.profiles.identity import workload_digest
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.names import named
from bf16prof.profiles.schema import Profile
from bf16prof.profiles.shipped import shipped_names, shipped_table
from bf16prof.records import Case, LossSummary, MemoryRecord

PREFIX = "published:"


@dataclass(frozen=True)
class Published:
    """A published run: what was said of it, and the profile and GPU with which it can be predicted."""

    name: str
    profile: Profile
    origins: dict[str, str]
    gpu: Gpu
    records: tuple[MemoryRecord, ...]


def published_names() -> list[str]:
    """The names of the runs that ship with the package."""
    return shipped_names("published", "bf16prof.imports")


def find_published(name: str) -> Published:
    """The published run of that name, without its prefix. Raises `InputError` naming the known ones."""
    names = {PREFIX + known: known for known in published_names()}
    name = named("published run", PREFIX + name, names)
    table = shipped_table(f"published/{name}.toml", "bf16prof.imports")
    found = load_profile(table["profile"], [Override(key, value, PREFIX + name) for key, value in table["set"].items()])
    gpu = find_gpu(table["gpu"])
    records = tuple(_record(row, table, found.profile, gpu) for row in table["runs"])
    return Published(name, found.profile, found.origins, gpu, records)


def _record(row: dict[str, Any], table: dict[str, Any], profile: Profile, gpu: Gpu) -> MemoryRecord:
    """One column of the published table. Its peak is `max_memory_allocated` since the process began."""
    case = Case(profile.name, table["zero_stage"], table["world_size"], row["recipe"], workload=workload_digest(profile))
    finding = Finding(
        "the published table",
        readings={name: rounded(row[key], GIB, len(row[key].partition(".")[2])) for name, key in _MEMORY.items()},
        facts={"step_time_s": row["step_time_s"]},
        notes=tuple(table["notes"]),
    )
    record = imported_record(case, [finding], gpu=gpu.id, notes=[f"published in {table['citation']}: {table['url']}"])
    return dataclasses.replace(record, loss=float(row["loss"]["final"]), loss_summary=_loss_summary(row["loss"], table))


def _loss_summary(loss: dict[str, str], table: dict[str, Any]) -> LossSummary:
    decimals = max(len(text.partition(".")[2]) for text in loss.values())
    return LossSummary(table["steps"], float(loss["mean"]), float(loss["std"]), decimals, table["citation"])


_MEMORY = {"allocated_bytes": "allocated_gb", "run_peak_allocated_bytes": "run_peak_allocated_gb"}
