"""One rank of a measurement: builds the model and the engine from the case, trains, and writes what
its probe saw.

Started by `measuring/launcher.py` as `python -m bf16prof.measuring.worker TASK FOLDER`; talks to
nobody but through its result file.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import re
import socket
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.errors import Bf16profError, InputError
from bf16prof.files import NotWritten
from bf16prof.measuring.batches import NextBatch, make_batches
from bf16prof.measuring.batons import use_dying_batons
from bf16prof.measuring.cache import CACHE_VARIABLE
from bf16prof.measuring.results import RankQuality, RankResult, RankTask, RankWriter
from bf16prof.processes import TORCH_CACHE, die_with_parent
from bf16prof.records import Item
from bf16prof.runs import Status, rank_log, read
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import Device, Phase
from bf16prof.whereabouts import Whereabouts, deadline

HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What PyTorch raises, as a RuntimeError, where the system has no memory left
(c10/core/impl/alloc_cpu.cpp)."""

GONE = re.compile("gloo/transport|Connection (closed|reset) by peer|Broken pipe|remote process exited|NCCL")
"""How gloo, NCCL and sockets say that the other side is gone."""


class Rank:
    """This process: its probe, its phase marks and its result so far."""

    def __init__(self, task: RankTask, folder: Path, whereabouts: Whereabouts) -> None:
        import torch

        from bf16prof.engine.phases import PhaseMarks
        from bf16prof.engine.training import import_libraries
        from bf16prof.measuring.probes import make_probe

        self.task, self.job, self.folder = task, task.job.job(), folder
        self.rank = int(os.environ["RANK"])
        if self.job.device is Device.GPU:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        import_libraries(self.job)
        self.probe = make_probe(self.job.device)
        self.clock = phase_clock(self.probe)
        self._whereabouts = whereabouts
        self._others: list[Any] = []
        self.marks = PhaseMarks(self.probe, self.probe.settle, self._begin)
        self.result = started_result(self.rank, self.probe)
        self._writer = RankWriter(folder)

    def _begin(self, phase: Phase | None) -> None:
        self.clock.mark(phase)
        self._whereabouts.enter(phase, len(self.result.steps))

    def save(self, *, force: bool = True, **changes: Any) -> None:
        """Update the result and write it; without `force`, only if the last write is long ago, and
        a full disk does not matter yet."""
        self.result = dataclasses.replace(self.result, **changes)
        self._writer.write(self.result, force=force)

    def run(self) -> None:
        """The whole measurement of this rank."""
        with self._face():
            self._measure()

    def _measure(self) -> None:
        """With NVML watching the GPU where there is one."""
        with self._device_sampler() as sampler:
            engine, loop = self._train()
            self._finish(engine, loop)
            if self.job.profile.workload.evaluation is not None:
                self._evaluate(engine, loop)
        if sampler is not None and (summary := sampler.summary()):
            self.save(**summary.of_a_result())
        if self.task.quality_steps:
            self._watch_updates(engine, loop)
        self.save(status=Status.FINISHED)

    def _face(self) -> AbstractContextManager[Any]:
        """What megatron-core finds where there is no GPU: it asks for CUDA devices by name."""
        if not (self.job.profile.is_for_megatron and self.job.device is Device.CPU):
            return nullcontext()
        from bf16prof.measuring.face import cpu_worn_as_gpu

        return cpu_worn_as_gpu(self.probe)

    def _device_sampler(self) -> AbstractContextManager[Any]:
        from bf16prof.measuring.probes.nvml import NvmlSampler, cuda_uuid

        return NvmlSampler(cuda_uuid(int(os.environ["LOCAL_RANK"]))) if self.probe.device_type == "cuda" else nullcontext()

    def _train(self) -> tuple[Any, Any]:
        import deepspeed

        from bf16prof.engine.phases import attach
        from bf16prof.engine.training import build_engine, build_reference, parameter_count, training_loop

        self.save()
        self._whereabouts.say("meeting the other ranks")
        deepspeed.init_distributed()
        job = self.job
        self.marks.mark(Phase.INIT)
        reference = build_reference(job)
        self._others = [] if reference is None else [reference]
        engine = build_engine(job)
        gc.collect()
        self.marks.mark(None)
        self.save(parameters=parameter_count(engine), init=self.marks.take()[Phase.INIT], run_peak_bytes=self.probe.run_peak_bytes())
        attach(engine, self.marks)
        loop = training_loop(engine, job, self._batches(job, engine), reference=reference)
        for index in range(self.task.warmup + self.task.steps):
            self._step(loop, index)
        return engine, loop

    def _step(self, loop: Any, index: int) -> None:
        self.marks.settle = self.probe.settle if index < self.task.warmup else None
        with _Timer(self.probe) as timer:
            loss = loop.step()
        self.probe.settle()
        record = StepRecord(
            step=index,
            loss=loss if math.isfinite(loss) else None,
            time_s=timer.seconds,
            device_time_s=timer.device_seconds,
            allocated_bytes=self.probe.allocated_bytes(),
            phases=self.marks.take(),
            warmup=index < self.task.warmup,
            phase_time_s=self.clock.take(),
            loss_not_finite=not math.isfinite(loss),
        )
        self.result = self.result.with_step(record)
        self.save(force=False, run_peak_bytes=self.probe.run_peak_bytes(), reserved_bytes=self.probe.reserved_bytes())

    def _finish(self, engine: Any, loop: Any) -> None:
        from bf16prof.engine.attribution import attribute

        allocated = self.probe.allocated_bytes()
        reserved = self.probe.reserved_bytes()
        items, host_items = attribute([engine, *self._others], loop.kept, self.probe.device_type)
        if workspaces := self.probe.free_workspaces():
            items.append(Item(*CUBLAS_WORKSPACES, workspaces, "measured: what freeing them gave back"))
        self.save(
            allocated_bytes=allocated,
            items=tuple(items),
            host_items=tuple(host_items),
            run_peak_bytes=self.probe.run_peak_bytes(),
            reserved_bytes=reserved,
            allocator_retries=self.probe.retries(),
        )

    def _batches(self, job: Any, engine: Any) -> NextBatch:
        from bf16prof.engine.training import takes_labels

        return make_batches(job, self.rank, self.probe.device_type, shifted=not takes_labels(engine.module))

    def _evaluate(self, engine: Any, loop: Any) -> None:
        """What is evaluated when the steps are over: memory settles at every mark, and no time is
        taken."""
        from bf16prof.engine.batch import evaluation_of

        batches = self._batches(evaluation_of(self.job), engine)
        self.marks.settle = self.probe.settle
        self.marks.mark(Phase.EVAL)
        loop.evaluate(batches)
        self.marks.mark(None)
        found = self.marks.take()[Phase.EVAL]
        self.save(evaluation=found, run_peak_bytes=self.probe.run_peak_bytes(), reserved_bytes=self.probe.reserved_bytes())

    def _watch_updates(self, engine: Any, loop: Any) -> None:
        """Further steps in which the optimizer's updates are watched; memory and time of these are
        nobody's."""
        from bf16prof.engine.engines import engine_of
        from bf16prof.quality.watch import UpdateWatch

        layout = engine_of(self.job).facts(self.job).layout
        if layout is None or not layout.is_adam:
            raise InputError("--quality: what this optimizer intends is known of Adam and AdamW only")
        watch = UpdateWatch(engine, layout)
        for index in range(len(self.result.steps), len(self.result.steps) + self.task.quality_steps):
            loss = loop.step()
            step = RankQuality(index, loss if math.isfinite(loss) else None, watch.take(), watch.take_casts())
            self.save(force=False, quality=(*self.result.quality, step))


def started_result(rank: int, probe: Any) -> RankResult:
    """The result of a rank that has just begun, with where it runs. Launchers other than torchrun
    number no nodes."""
    return RankResult(
        rank,
        os.getpid(),
        Status.RUNNING,
        probe.device,
        probe.name,
        host=socket.gethostname(),
        node=int(os.environ.get("GROUP_RANK", "0")),
        device_index=int(os.environ.get("LOCAL_RANK", "0")) if probe.device is Device.GPU else None,
    )


class _Timer:
    """Seconds between entry and exit: by the monotonic clock, and on a GPU also by a pair of CUDA
    events."""

    def __init__(self, probe: Any) -> None:
        self._probe = probe
        self._events: list[Any] = []
        self.seconds = 0.0
        self.device_seconds: float | None = None

    def __enter__(self) -> _Timer:
        self._probe.synchronize()
        self._start = time.perf_counter()
        self._event()
        return self

    def __exit__(self, *error: object) -> None:
        self._event()
        self._probe.synchronize()
        self.seconds = time.perf_counter() - self._start
        if len(self._events) == 2:
            self.device_seconds = self._events[0].elapsed_time(self._events[1]) / 1000

    def _event(self) -> None:
        if self._probe.device_type == "cuda":
            self._events.append(recorded_event())


def recorded_event() -> Any:
    """A timing event on the current CUDA stream, here."""
    import torch

    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def phase_clock(probe: Any) -> Any:
    """A clock of phases: of the device where there is one, as the host runs ahead of it. Events are
    read after a step has synchronised."""
    from bf16prof.engine.phases import PhaseClock

    if probe.device_type == "cuda":
        return PhaseClock(recorded_event, lambda begin, end: float(begin.elapsed_time(end)) / 1000)
    return PhaseClock()


def main() -> None:
    """Run one rank; leave with 1 after writing why, if anything goes wrong."""
    die_with_parent()
    task_path, folder, number = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    _log_to(rank_log(folder, number))
    whereabouts = Whereabouts(folder, number, deadline())
    os.environ.setdefault(TORCH_CACHE, str(Path(os.environ[CACHE_VARIABLE]) / "torch"))
    use_dying_batons()
    rank = Rank(read(task_path, RankTask), folder, whereabouts)
    try:
        rank.run()
    except BaseException as error:
        stopped_at = time.monotonic()  # before anything is unwound: the others notice when connections are closed
        said: dict[str, Any] = {"status": _status(error), "message": _message(error), "noticed": has_noticed(error)}
        rank.save(**said, run_peak_bytes=rank.probe.run_peak_bytes(), stopped_at=stopped_at)
        raise
    # Ranks leave without running Python's and DeepSpeed's finalizers, whose order across ranks can
    # hang or crash a finished job.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _status(error: BaseException) -> Status:
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError) or HOST_MEMORY in str(error):
        return Status.OOM
    if isinstance(error, InputError):
        return Status.FAILED if isinstance(error, NotWritten) else Status.REFUSED
    return Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED


def has_noticed(error: BaseException) -> bool:
    """Whether an error says no more than that another rank, or the connection to it, is gone."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError | OSError) and bool(GONE.search(str(error))))


def _message(error: BaseException) -> str:
    """One line on what went wrong."""
    if isinstance(error, Bf16profError):
        return f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, SystemExit):
        return f"left by sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _log_to(path: Path) -> None:
    """Send everything this process prints, from Python and from C++, to its log file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


if __name__ == "__main__":
    main()
