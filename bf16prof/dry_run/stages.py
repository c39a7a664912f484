"""The stages of a pipeline, each in a dry run of its own: what one sends on is told to the next,
and of their records one is the job's.

A fake process group delivers nothing, and a stage learns the shapes of what it gets from the stage
before it, in its first forward pass (runtime/pipe/engine.py, _recv_tensor_meta). What the stage
before sends lies in a file beside its record. Stages are started in their order, so that each waits
for one that runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.errors import RunFailed
from bf16prof.files import write_json
from bf16prof.parallelism import Parallelism
from bf16prof.records import Case, MemoryRecord, RankSummary
from bf16prof.runs import read
from bf16prof.vocabulary import STRICT, Verdict

POLL_S = 0.05


@dataclass(frozen=True)
class Sent:
    """What a stage sends on for a micro-batch: one tensor, or several, each by shape and dtype."""

    __pydantic_config__ = STRICT

    is_one: bool
    tensors: tuple[tuple[tuple[int, ...], str], ...]
    schema_version: int = SCHEMA_VERSION


def ranks_run(case: Case) -> list[int]:
    """The ranks that a dry run runs: the first of each stage."""
    parallelism = case.parallelism
    return [stage * parallelism.of_a_stage for stage in range(parallelism.pipeline)]


@contextlib.contextmanager
def told(own: Path, before: Path | None, has_ended: Callable[[], bool]) -> Iterator[None]:
    """Inside, a pipeline's engine writes what it sends to `own` and reads what it gets from
    `before`, unless the stage before has ended."""
    import torch
    from deepspeed.runtime.pipe import engine, p2p

    real = engine.PipelineEngine._send_tensor_meta

    def send(self: Any, buffer: Any, stage: int) -> None:
        real(self, buffer, stage)
        tensors = (buffer,) if isinstance(buffer, torch.Tensor) else buffer
        shapes = tuple((tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in tensors)
        write_json(own, Sent(isinstance(buffer, torch.Tensor), shapes))

    def receive(self: Any, stage: int) -> Any:
        assert before is not None, "the first stage receives nothing"
        description = torch.empty(engine.TENSOR_META_SIZE, dtype=torch.int32, device=self.device)
        p2p.recv(description, stage)
        sent = _read(before, has_ended)
        buffers = [self._allocate_or_extend_buffers(n, list(shape), getattr(torch, dtype)) for n, (shape, dtype) in enumerate(sent.tensors)]
        return buffers[0] if sent.is_one else tuple(buffers)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(engine.PipelineEngine, "_send_tensor_meta", send))
        stack.enter_context(mock.patch.object(engine.PipelineEngine, "_recv_tensor_meta", receive))
        yield


def _read(path: Path, has_ended: Callable[[], bool]) -> Sent:
    while not path.exists():
        if has_ended() and not path.exists():
            raise RunFailed("the stage before this one has ended without sending anything")
        time.sleep(POLL_S)
    sent: Sent = read(path, Sent)
    return sent


def severity(record: MemoryRecord) -> tuple[int, int]:
    """How badly a stage fits: by its verdict, then by its peak."""
    said = {Verdict.TIGHT: 1, Verdict.DOES_NOT_FIT: 2}
    return (said.get(record.verdict, 0) if record.verdict else 0), record.peak_allocated_bytes or 0


def of_all_stages(records: Sequence[MemoryRecord]) -> MemoryRecord:
    """The record of a job from those of its stages, in their order: that of the stage that fits
    worst, with all of them as its ranks."""
    if len(records) == 1:
        return records[0]
    case, worst = records[0].case, max(records, key=severity)
    parameters = [record.parameters or 0 for record in records]
    summaries = [_summary(record, rank, case.parallelism) for rank, record in zip(ranks_run(case), records, strict=True)]
    return dataclasses.replace(
        worst,
        parameters=sum(parameters),
        ranks=tuple(summaries),
        notes=(f"of stage {records.index(worst) + 1} of {len(records)}, which fits worst", bubble(worst), *worst.notes),
    )


def _summary(record: MemoryRecord, rank: int, parallelism: Parallelism) -> RankSummary:
    return RankSummary(
        rank,
        f"stage {parallelism.stage(rank) + 1}",
        0,
        record.gpu or "cpu",
        allocated_bytes=record.allocated_bytes,
        peak_allocated_bytes=record.peak_allocated_bytes,
        run_peak_allocated_bytes=record.run_peak_allocated_bytes,
        reserved_bytes=record.reserved_bytes,
    )


def bubble(record: MemoryRecord) -> str:
    """How long each stage waits for others, by the schedule (runtime/pipe/schedule.py,
    TrainSchedule) and stages that are equally fast."""
    assert record.workload is not None
    stages, steps = record.case.pipeline_parallel, record.workload.gradient_accumulation_steps
    return f"each stage waits for {stages - 1} of {steps + stages - 1} turns of the schedule (1F1B), where all take the same time"
