"""A series of cases that goes on where it stopped: which cases of a run directory are finished, and
still are what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.documents import as_json
from bf16prof.errors import InputError
from bf16prof.measuring.machine import versions
from bf16prof.measuring.results import RankTask
from bf16prof.records import MemoryRecord
from bf16prof.runs import MANIFEST, SPEC, CaseStatus, Node, Run, Status, load, read
from bf16prof.vocabulary import Source

START_ANEW = "--force starts anew"


@dataclass(frozen=True)
class Finished:
    """What is kept of a run: the cases that are finished with their records, by label, and the
    nodes that it knew."""

    cases: Mapping[str, tuple[CaseStatus, MemoryRecord]]
    nodes: tuple[Node, ...] = ()


NOTHING = Finished({})


def finished(folder: Path, tasks: Sequence[RankTask]) -> Finished:
    """The finished cases of the run in that folder, if there is one.

    Raises `InputError` where one of them is not among the tasks, or was measured with other
    settings or versions: results would be lost, or mixed.
    """
    if not (folder / MANIFEST).exists():
        return NOTHING
    run = load(folder)
    records = {record.case: record for record in run.records if record.source is Source.MEASURE}
    done = {status.case.label: status for status in run.manifest.cases if status.status is Status.FINISHED and status.case in records}
    if done:
        _require_same_versions(run)
    asked = {task.job.case.label: task for task in tasks}
    for label in done:
        if label not in asked:
            raise InputError(f"--resume: {folder} holds {label}, which is not asked for now", hint=f"ask for it as well; {START_ANEW}")
        if as_json(read(folder / label / SPEC, RankTask)) != as_json(asked[label]):
            raise InputError(f"--resume: {label} in {folder} was measured with other settings", hint=f"repeat what was typed; {START_ANEW}")
    return Finished({label: (status, records[status.case]) for label, status in done.items()}, run.manifest.nodes)


def _require_same_versions(run: Run) -> None:
    now = versions()
    for name in sorted(now.keys() | run.manifest.versions.keys()):
        old, new = run.manifest.versions.get(name, "none"), now.get(name, "none")
        if old != new:
            raise InputError(f"--resume: {run.path} was measured with {name} {old}, and now it is {new}", hint=START_ANEW)
