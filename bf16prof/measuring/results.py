"""What one rank writes and the launching process reads: one JSON file per rank, rewritten as the
rank proceeds."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

from bf16prof.cases import JobFile
from bf16prof.documents import SCHEMA_VERSION
from bf16prof.files import NotWritten, write_json
from bf16prof.quality.casts import Casts
from bf16prof.quality.sums import Sums
from bf16prof.records import Case, Item, Workload, merge_phases
from bf16prof.runs import Status, rank_file, read
from bf16prof.scripts.command import Script
from bf16prof.step_records import PhaseMemory, StepRecord
from bf16prof.vocabulary import STRICT, Device, Phase, Size


@dataclass(frozen=True)
class RankTask:
    """What every rank of a case is told: the job, and how many steps to run before and while
    measuring, and watching updates after that."""

    __pydantic_config__ = STRICT

    job: JobFile
    warmup: int
    steps: int
    quality_steps: int = 0
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class RankQuality:
    """One watched step on one rank: its loss, what became of the updates that this rank makes, by
    layer, and what casts make of values."""

    __pydantic_config__ = STRICT

    step: Size
    loss: float | None
    layers: dict[str, Sums]
    casts: dict[str, Casts] = field(default_factory=dict)


@dataclass(frozen=True)
class OfScript:
    """What a rank of a user's own script says of the job: the script, of how many ranks this is
    one, and the case and the workload as its engine has them, once there is one. `notes`: what else
    there is to say.
    """

    __pydantic_config__ = STRICT

    script: Script
    world_size: Size
    case: Case | None = None
    workload: Workload | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuestTask:
    """What a rank of a script is told: how many steps to watch closely, how many to time after
    that, and whether to end the script then."""

    __pydantic_config__ = STRICT

    script: Script
    warmup: int = 3
    steps: int = 10
    is_ended: bool = False
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class RankResult:
    """What one rank has measured so far. `status` is `finished` only at the very end; anything else
    is partial.

    `host`, `node` (its number) and `device_index` say where it runs; the index is `None` on a CPU.
    Fields are called as in `MemoryRecord`; what did not fit when a rank ran out of memory is in
    `message`. `stopped_at`: when something was raised that stopped the rank, in seconds of the
    system's monotonic clock. `noticed`: that only said that another rank is gone.
    """

    __pydantic_config__ = STRICT

    rank: int
    pid: int
    status: Status
    device: Device
    device_name: str
    host: str = ""
    node: Size = 0
    device_index: Size | None = None
    parameters: int = 0
    message: str = ""
    init: PhaseMemory = field(default_factory=PhaseMemory)
    evaluation: PhaseMemory | None = None
    steps: tuple[StepRecord, ...] = ()
    allocated_bytes: Size | None = None
    items: tuple[Item, ...] = ()
    host_items: tuple[Item, ...] = ()
    run_peak_bytes: Size | None = None
    reserved_bytes: Size | None = None
    device_bytes: Size | None = None
    allocator_retries: int | None = None
    gpu_utilisation: float | None = None
    power_w: float | None = None
    quality: tuple[RankQuality, ...] = ()
    stopped_at: float | None = None
    noticed: bool = False
    of_script: OfScript | None = None
    schema_version: int = SCHEMA_VERSION

    def with_step(self, step: StepRecord) -> RankResult:
        """The same result with one more step."""
        return dataclasses.replace(self, steps=(*self.steps, step))

    def training_phases(self) -> dict[Phase, PhaseMemory]:
        """Init, of each phase of a step the highest peak and the last end of the warm-up steps, and
        the evaluation.

        In these memory settles at every mark (see `worker.py`). In timed steps it does not, and
        gloo's threads may hold a bucket into the next phase: that is in `steps` and in the run's
        peak, and says nothing of the job. The first step of all is not like the others, so with
        fewer than two warm-up steps all steps count.
        """
        settled = [step for step in self.steps if step.warmup]
        phases = {Phase.INIT: self.init}
        for step in settled if len(settled) > 1 else self.steps:
            phases = merge_phases(phases, step.phases)
        return phases if self.evaluation is None else {**phases, Phase.EVAL: self.evaluation}


def save_rank(folder: Path, result: RankResult) -> None:
    """Write a rank's result, atomically."""
    write_json(rank_file(folder, result.rank), result)


WRITE_EVERY_S = 1.0
"""A partial result is written at most this often, and never inside a timed step."""

WRITING_SHARE = 0.001
"""The part of a rank's time that writing partial results may take: they grow with the steps."""


class RankWriter:
    """Writes a rank's result again and again, some writes left out where they would come too
    often."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._due = folder, 0.0

    @property
    def is_due(self) -> bool:
        """Whether the last write is long ago."""
        return time.monotonic() > self._due

    def write(self, result: RankResult, *, force: bool) -> None:
        """Write it; without `force`, only if the last write is long ago, and a full disk does not
        matter yet."""
        if not force and not self.is_due:
            return
        begin = time.monotonic()
        with contextlib.nullcontext() if force else contextlib.suppress(NotWritten):
            save_rank(self._folder, result)
        end = time.monotonic()
        self._due = end + max(WRITE_EVERY_S, (end - begin) / WRITING_SHARE)


def load_rank(folder: Path, rank: int) -> RankResult | None:
    """A rank's result; `None` when it has written none. Raises `InputError` for a file that cannot
    be read."""
    path = rank_file(folder, rank)
    if not path.exists():
        return None
    result: RankResult = read(path, RankResult)
    return result
