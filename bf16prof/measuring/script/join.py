"""Joins what the ranks of a script have written into a run: whatever launcher they had, there is
one file per rank and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from bf16prof.documents import as_json
from bf16prof.errors import InputError
from bf16prof.files import LARGEST_DOCUMENT, read_up_to
from bf16prof.measuring.blame import blame
from bf16prof.measuring.launcher import RanksOutcome
from bf16prof.measuring.machine import environment, hardware, versions
from bf16prof.measuring.record import TrainedSubject, record_of_ranks
from bf16prof.measuring.results import OfScript, RankResult, load_rank
from bf16prof.profiles.gpus import Gpu, gpu_named
from bf16prof.records import Case, MemoryRecord
from bf16prof.runs import MANIFEST, SCRIPT_FOLDER, CaseStatus, Manifest, Node, Run, Status, command_line, now, read, save
from bf16prof.vocabulary import Device

UNKNOWN_CASE = "not known: no engine took a step"


def joins(run_folder: Path) -> bool:
    """Whether ranks have written into this run directory since it was last joined, or it never was.

    By what is in their files: clocks are set back, and copies have times of their own.
    """
    files = _rank_files(run_folder)
    if not files or not (run_folder / MANIFEST).exists():
        return bool(files)
    manifest: Manifest = read(run_folder / MANIFEST, Manifest)
    return manifest.joined != _digest(files)


def _rank_files(run_folder: Path) -> list[Path]:
    return sorted((run_folder / SCRIPT_FOLDER).glob("rank*.json"))


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0".encode() + hashlib.sha256(read_up_to(LARGEST_DOCUMENT, file)).digest())
    return digest.hexdigest()


def join(run_folder: Path, outcome: RanksOutcome | None = None, predictions: Sequence[MemoryRecord] = (), created: str = "") -> Run:
    """The run of the ranks in that directory, saved. `outcome`: how it ended, where the ranks were
    started by us.

    Raises `InputError` where the files are not those of one job.
    """
    ranks = load_ranks(run_folder / SCRIPT_FOLDER)
    outcome = outcome or outcome_of(ranks)
    told = [rank.of_script for rank in outcome.ranks if rank is not None and rank.of_script is not None]
    first = next((each for each in told if each.case is not None), told[0])
    device = next(rank.device for rank in ranks if rank is not None)
    case = first.case or Case(first.script.name, 0, first.world_size, UNKNOWN_CASE)
    record = script_record(outcome, first, case, device)
    status = CaseStatus(case, outcome.status, outcome.message, outcome.log_tail)
    manifest = Manifest(
        name=first.script.name,
        created=created or now(),
        finished=now(),
        status=outcome.status,
        device=device,
        argv=command_line(),
        cases=(status,),
        profile={"script": as_json(first.script)},
        versions=versions(),
        hardware=hardware(),
        environment=environment(),
        joined=_digest(_rank_files(run_folder)),
        nodes=tuple(Node(report.node, report.host, report.hardware) for report in outcome.nodes),
    )
    run = Run(run_folder, manifest, (*predictions, *([record] if record else [])))
    save(run)
    return run


def load_ranks(folder: Path) -> tuple[RankResult | None, ...]:
    """All ranks of the job, those that have written nothing as `None`. Raises `InputError` unless
    they are of one job."""
    numbers = sorted(int(file.stem[4:]) for file in folder.glob("rank*.json") if file.stem[4:].isdecimal())
    found = {number: load_rank(folder, number) for number in numbers}
    told = {number: rank.of_script for number, rank in found.items() if rank is not None and rank.of_script is not None}
    if not told:
        raise InputError(f"{folder} holds no ranks of a script")
    jobs = {(each.script.name, each.world_size) for each in told.values()}
    if len(jobs) > 1:
        said = " and ".join(f"{name} on {size} ranks" for name, size in sorted(jobs))
        raise InputError(f"{folder} holds ranks of different jobs: {said}", hint="each job needs a run directory of its own")
    ((_, world_size),) = jobs
    if max(numbers) >= world_size:
        raise InputError(f"{folder} holds rank {max(numbers)} of a job of {world_size} ranks")
    return tuple(found.get(rank) for rank in range(world_size))


def outcome_of(ranks: tuple[RankResult | None, ...]) -> RanksOutcome:
    """How a job ended of which nothing is known but what its ranks wrote."""
    cause = blame({}, ranks, by_kernel=False)
    if cause is not None:
        return RanksOutcome(cause.status, f"rank {cause.rank}: {cause.message}", "", ranks)
    missing = [rank for rank, result in enumerate(ranks) if result is None]
    if missing:
        return RanksOutcome(Status.FAILED, f"nothing from rank {', '.join(map(str, missing))} of {len(ranks)}", "", ranks)
    running = [rank for rank, result in enumerate(ranks) if result is not None and result.status is not Status.FINISHED]
    if running:
        return RanksOutcome(Status.INTERRUPTED, f"rank {', '.join(map(str, running))} runs, or was killed", "", ranks)
    return RanksOutcome(Status.FINISHED, "", "", ranks)


def script_record(outcome: RanksOutcome, of: OfScript, case: Case, device: Device) -> MemoryRecord | None:
    """The record of a script's ranks, judged against the GPU that they ran on."""
    ranks = [rank for rank in outcome.ranks if rank is not None]
    name = next((rank.device_name for rank in ranks if rank.device_name), "")
    gpu = _gpu(name) if device is Device.GPU else None
    record = record_of_ranks(outcome, TrainedSubject(case, device, of.workload, gpu))
    if record is None:
        return None
    steps = f"{len(record.steps)} steps of {of.script.name}"
    return dataclasses.replace(record, notes=(steps, *of.notes, *record.notes))


def _gpu(name: str) -> Gpu | None:
    row = gpu_named(name)
    return dataclasses.replace(row, id=name, name=name) if row is not None else None
