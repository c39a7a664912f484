"""Runs that others published, as data files with their citation (`published/*.toml`); a command
names one `published:NAME`.

A file says what was run (a profile, and what is set over it), what was measured, what its source
leaves open (`open`), what was therefore assumed (`assumed`), and what else a reader must know
(`notes`). A row of `runs` is one measured case; it may set more over the profile, and say so
(`what`). `dry_run` is set over all that for the dry run alone: the model as the libraries of that
time ran it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bf16prof.cases import Job, Selection, expand
from bf16prof.imports.finding import GIB, MIB, Finding, Reading, rounded
from bf16prof.imports.record import imported_record
from bf16prof.profiles.gpus import Gpu, find_gpu
from bf16prof.profiles.load import Override, Resolved, load_profile
from bf16prof.profiles.names import named
from bf16prof.profiles.shipped import shipped_names, shipped_table
from bf16prof.records import MemoryRecord
from bf16prof.step_records import LossSummary
from bf16prof.vocabulary import Device, Offload

PREFIX = "published:"

QUANTITIES = {
    "allocated": "allocated_bytes",
    "peak": "peak_allocated_bytes",
    "run_peak": "run_peak_allocated_bytes",
    "init_peak": "phases.init.peak_bytes",
    "reserved": "reserved_bytes",
    "device": "device_bytes",
}
"""What a file calls a quantity, with its unit behind it (`allocated_gib = "25.74"`, `run_peak_bytes
= 14176305664`)."""


@dataclass(frozen=True)
class PublishedRun:
    """One measured case: what was measured, how it was resolved, and the job that predicts it."""

    record: MemoryRecord
    resolved: Resolved
    job: Job
    at_least: Mapping[str, int]
    """Quantities of which only a lower bound is known, in bytes: what a job that ran out of memory
    asked for."""
    dry_job: Job
    """The job for a dry run: of the code that was run then, where the installed libraries keep
    something else."""
    what: str = ""
    """What tells it from other runs of its case."""


@dataclass(frozen=True)
class Published:
    """A publication: its source, and its runs."""

    name: str
    citation: str
    url: str
    title: str
    open: tuple[str, ...]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    gpu: Gpu
    runs: tuple[PublishedRun, ...]
    expandable_segments: bool = False
    """How the caching allocator was set."""

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        """What was measured."""
        return tuple(run.record for run in self.runs)


def published_names() -> list[str]:
    """The names of the runs that ship with the package."""
    return shipped_names("published", "bf16prof.imports")


def all_published() -> Iterator[Published]:
    """Every publication, in the order of the names."""
    return map(find_published, published_names())


def find_published(name: str) -> Published:
    """The published run of that name, without its prefix. Raises `InputError` naming the known
    ones."""
    names = {PREFIX + known: known for known in published_names()}
    name = named("published run", PREFIX + name, names)
    table = shipped_table(f"published/{name}.toml", "bf16prof.imports")
    gpu = find_gpu(table["gpu"])
    said = {key: tuple(table.get(key, ())) for key in ("open", "assumed", "notes")}
    expandable = table.get("expandable_segments", False)
    runs = tuple(_run(name, row, table, gpu) for row in table["runs"])
    return Published(name, table["citation"], table["url"], table["title"], **said, gpu=gpu, runs=runs, expandable_segments=expandable)


def _run(name: str, row: Mapping[str, Any], table: Mapping[str, Any], gpu: Gpu) -> PublishedRun:
    """One row. A peak is `max_memory_allocated` since the process began, unless it is called
    otherwise."""
    values = {**table.get("set", {}), **row.get("set", {})}
    resolved = _resolved(name, table, values)
    stage, world = (row.get(key, table.get(key)) for key in ("zero_stage", "world_size"))
    offload = Offload(row.get("offload", table.get("offload", Offload.NONE)))
    job, dry_job = (
        expand(Selection(each.profile, [stage], [world], [row["recipe"]], Device.GPU, gpu, offload))[0]
        for each in (resolved, _resolved(name, table, values | table.get("dry_run", {})))
    )
    readings = {QUANTITIES[quantity]: reading for quantity, reading in _readings(row)}
    at_least = {QUANTITIES[quantity]: reading.low for quantity, reading in _readings(row.get("at_least", {}))}
    facts = {"step_time_s": row["step_time_s"]} if "step_time_s" in row else {}
    finding = Finding("the published table", readings=readings, facts=facts, notes=tuple(_notes(table, at_least)))
    record = imported_record(job.case, [finding], gpu=gpu.id, notes=[f"published in {table['citation']}: {table['url']}"])
    if "loss" in row:
        record = dataclasses.replace(record, loss=float(row["loss"]["final"]), loss_summary=_loss_summary(row["loss"], table))
    return PublishedRun(record, resolved, job, at_least, dry_job, row.get("what", ""))


def _resolved(name: str, table: Mapping[str, Any], values: Mapping[str, Any]) -> Resolved:
    return load_profile(table.get("profile"), [Override(key, value, PREFIX + name) for key, value in values.items()])


def _readings(row: Mapping[str, Any]) -> Iterator[tuple[str, Reading]]:
    for quantity in QUANTITIES:
        if f"{quantity}_bytes" in row:
            yield quantity, Reading(row[f"{quantity}_bytes"])
        for unit, size in (("gib", GIB), ("mib", MIB)):
            if text := row.get(f"{quantity}_{unit}"):
                yield quantity, rounded(text, size, len(text.partition(".")[2]))


def _notes(table: Mapping[str, Any], at_least: Mapping[str, int]) -> Iterator[str]:
    yield from table.get("notes", ())
    yield from (f"its source leaves open: {text}" for text in table.get("open", ()))
    yield from (f"assumed: {text}" for text in table.get("assumed", ()))
    yield from (f"{quantity} is {size:,} at least: it ran out of memory" for quantity, size in at_least.items())


def _loss_summary(loss: Mapping[str, str], table: Mapping[str, Any]) -> LossSummary:
    decimals = max(len(text.partition(".")[2]) for text in loss.values())
    return LossSummary(table["steps"], float(loss["mean"]), float(loss["std"]), decimals, table["citation"])
