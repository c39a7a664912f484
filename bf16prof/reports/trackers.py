"""Runs in an experiment tracker: TensorBoard or Weights & Biases, through their own libraries (the
extras `tensorboard` and `wandb`).

A record is a run there: its case and device as the configuration, what it says of the job as single
values, and its steps as curves. Bytes stay bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bf16prof.errors import InputError, install_hint
from bf16prof.records import MemoryRecord
from bf16prof.reports.units import inert
from bf16prof.reports.views import run_views
from bf16prof.runs import Run
from bf16prof.step_records import StepRecord


def require(package: str, flag: str) -> None:
    """Raise `InputError` naming the flag where the tracker's library is not installed."""
    if find_spec(package) is None:
        raise InputError(f"{flag} needs {package}", hint=install_hint(package))


def values(record: MemoryRecord) -> dict[str, float]:
    """What a record says of the job as a whole; what it does not know is left out. Bytes of one
    GPU, seconds."""
    known: dict[str, float | None] = {
        "memory/allocated_bytes": record.allocated_bytes,
        "memory/peak_allocated_bytes": record.peak_allocated_bytes,
        "memory/reserved_bytes": record.reserved_bytes,
        "memory/device_bytes": record.device_bytes,
        "time/step_s": record.step_time_s,
    }
    known |= {f"component/{component}_bytes": size for component, size in record.components.items()}
    known |= {f"peak/{phase}_bytes": memory.peak_bytes for phase, memory in record.phases.items()}
    return {name: value for name, value in known.items() if value is not None}


def curves(step: StepRecord) -> dict[str, float]:
    """What a step says, likewise."""
    known: dict[str, float | None] = {"step/loss": step.loss, "step/time_s": step.time_s, "step/allocated_bytes": step.allocated_bytes}
    known |= {f"step/{phase}_peak_bytes": memory.peak_bytes for phase, memory in step.phases.items()}
    return {name: value for name, value in known.items() if value is not None}


def to_tensorboard(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write one run of TensorBoard per record below the folder; the folders that were written."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def event(step: int, scalars: dict[str, float]) -> Any:
        return Event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]))

    written = []
    for name, record in _named(runs):
        place = folder / name
        writer = EventFileWriter(str(place))
        writer.add_event(event(0, values(record)))
        for step in record.steps:
            writer.add_event(event(step.step, curves(step)))
        writer.close()
        written.append(place)
    return written


def to_wandb(runs: Sequence[Run], project: str) -> list[str]:
    """Log one run of Weights & Biases per record; their names. Where it goes, and whether at all,
    `WANDB_MODE` and the login decide."""
    import wandb

    written = []
    for name, record in _named(runs):
        with wandb.init(project=project, name=name, config=_configuration(record), reinit="finish_previous") as run:
            for step in record.steps:
                run.log(curves(step), step=step.step)
            run.summary.update(values(record))
        written.append(name)
    return written


def _named(runs: Sequence[Run]) -> Iterator[tuple[str, MemoryRecord]]:
    """Each record with a name of its own that is also the name of a folder: its case and its
    source, numbered where two are alike."""
    seen: dict[str, int] = {}
    for view in run_views(runs):
        for record in view.records.values():
            name = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in inert(f"{view.label}-{record.source}"))
            seen[name] = seen.get(name, 0) + 1
            yield name if seen[name] == 1 else f"{name}-{seen[name]}", record


def _configuration(record: MemoryRecord) -> dict[str, Any]:
    from bf16prof.documents import as_json

    case: dict[str, Any] = as_json(record.case)
    return {**case, "source": str(record.source), "device": str(record.device), "gpu": record.gpu, "parameters": record.parameters}
