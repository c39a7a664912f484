"""What the caching allocator reserves for a job: the allocations and frees of the closed form, replayed through its model.

The walk through a step (`passes.py`) says what is allocated and freed in which order. `Replay` is a meter that hands each of these to
`allocator.CachingAllocator`, on the streams that DeepSpeed uses. The init phase, the first step and further steps are replayed until the
allocator has settled, as the dry run does it (`simulate/repeat.py`).

What is not known here, and may differ from a real run: which of several equal blocks is freed first (the oldest of DeepSpeed's, the newest
of the model's), and small tensors that no closed form counts.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bf16prof.allocator import Block, CachingAllocator, OutOfMemory
from bf16prof.cases import Job
from bf16prof.engine import labels
from bf16prof.engine.config import Wrapper, overlaps_communication
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.estimate import training
from bf16prof.estimate.first_step import LAZY
from bf16prof.estimate.gathers import Gathers
from bf16prof.estimate.gradients import Flush, Gradients, PartitionedGradients, Reduction, Share, reduced_pieces
from bf16prof.estimate.initial import initial
from bf16prof.estimate.kept import between_steps
from bf16prof.estimate.passes import Handler, Meter
from bf16prof.estimate.program import Program
from bf16prof.estimate.steady import Engine
from bf16prof.estimate.step import step
from bf16prof.models.autograd.tape import GRADIENT
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.records import Label, Phase
from bf16prof.rounding import ceil_div, round_up

MOST_STEPS = 14
"""As many as the dry run does: two, and twelve that repeat."""

GATHER_STREAM, REDUCE_STREAM = 1, 2
STREAMS: dict[Wrapper, dict[Label, int]] = {
    Wrapper.ZERO3: {
        labels.GATHERED_PARAMETERS: GATHER_STREAM,
        labels.ALL_GATHER_BUCKETS: GATHER_STREAM,
        labels.REDUCE_SCATTER_BUFFER: REDUCE_STREAM,
        labels.GRADIENT_NORM: REDUCE_STREAM,
    },
    Wrapper.ZERO12: {
        labels.GRADIENT_PARTITION: REDUCE_STREAM,
        labels.ALL_REDUCE_BUFFER: REDUCE_STREAM,
        labels.GRADIENT_NORM: REDUCE_STREAM,
    },
}
"""What is allocated on a stream of DeepSpeed's own in forward and backward, where communication overlaps (stage3.py `__allgather_stream`,
`reduce_and_partition_stream`; stage_1_and_2.py `reduction_stream`). Each stream has its own blocks."""


@dataclass(frozen=True)
class Replayed:
    """What the allocator did.

    * `reserved_bytes`: the most that it reserved; `allocated_bytes`: the most that was allocated.
    * `shortage`: where the memory did not suffice: the phase, and the allocator's numbers.
    * `retries`: allocations that found room only after the cache was freed.
    """

    reserved_bytes: int
    allocated_bytes: int
    retries: int
    shortage: tuple[Phase, OutOfMemory] | None = None


@dataclass
class Shared:
    """Blocks of one label and size."""

    blocks: deque[Block] = field(default_factory=deque)


class Replay(Meter):
    """A meter whose storages are blocks of a caching allocator."""

    def __init__(self, block: int, allocator: CachingAllocator, streams: dict[Label, int], ranks: int) -> None:
        super().__init__(block)
        self.allocator = allocator
        self.lazy: list[tuple[Label, deque[int]]] = []
        """States that the optimizer makes in its first step: of each label the sizes."""
        self.reserved = self.allocated = 0
        self.shortage: tuple[Phase, OutOfMemory] | None = None
        self.how: Reduction | None = None
        self.share_of: Share | None = None
        self._streams, self._ranks = streams, ranks
        self._blocks: dict[Label, dict[int, deque[Block]]] = {}
        self._partition: list[int] = []
        self._early: list[int] = []
        self._kept_partition = False

    def begin(self, phase: Phase) -> None:
        """A phase begins."""
        self.phase = phase

    def see(self, level: int, events: int) -> None:
        """Peaks are the allocator's here."""

    def add(self, label: Label, size: int) -> None:
        """Allocate a block."""
        stream = self._streams.get(label, 0) if self.phase in (Phase.FORWARD, Phase.BACKWARD) else 0
        allocator = self.allocator
        try:
            block = allocator.allocate(size, stream)
        except OutOfMemory as error:
            self.shortage = self.phase, error
            allocator.lift_limit()
            block = allocator.allocate(size, stream)
        self._blocks.setdefault(label, {}).setdefault(size, deque()).append(block)
        if allocator.allocated_bytes > self.allocated:
            self.allocated = allocator.allocated_bytes
        if allocator.reserved_bytes > self.reserved:
            self.reserved = allocator.reserved_bytes

    def drop(self, label: Label, size: int, *, newest: bool = False) -> None:
        """Free a block of that label and size; where there is none, as many of the label as make up the size."""
        same = self._blocks.get(label)
        if not same:
            return
        blocks = same.get(size)
        if blocks:
            self.allocator.free(blocks.pop() if newest else blocks.popleft())
            return
        for other, queue in same.items():
            while queue and 0 < other <= size:
                self.allocator.free(queue.popleft())
                size -= other

    def rename(self, old: Label, new: Label, size: int) -> None:
        """The newest block of a label has another name from now on."""
        queue = self._blocks.get(old, {}).get(size)
        if queue:
            self._blocks.setdefault(new, {}).setdefault(size, deque()).append(queue.pop())

    def take(self, label: Label, *sizes: int) -> None:
        """The engine allocates storages of these sizes."""
        total = 0
        for size in sizes:
            if size:
                self.add(label, size)
                total += size
        if total:
            self.held[label] = self.held.get(label, 0) + total

    def give(self, label: Label, *sizes: int) -> None:
        """The engine frees them."""
        total = 0
        for size in sizes:
            if size:
                self.drop(label, size)
                total += size
        if total:
            self.held[label] = self.held.get(label, 0) - total

    def exchange(self, old: Label, new: Label, pairs: Iterable[tuple[int, int]]) -> None:
        """One after the other, the engine allocates the second of each pair and frees the first."""
        for before, after in pairs:
            self.take(new, after)
            self.give(old, before)

    def share(self, label: Label, *parts: int) -> None:
        """Each rank allocates its share of storages of so many bytes for a moment."""
        self.touch(label, *(ceil_div(part, self._ranks) for part in parts))

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache`."""
        self.allocator.empty_cache()

    def updates(self, tensors: int) -> None:
        """The optimizer updates so many tensors, whose states it makes the first time."""
        for _ in range(tensors):
            for label, sizes in self.lazy:
                if sizes:
                    self.take(label, sizes.popleft())

    def interrupt(self, moment: object) -> None:
        """A bucket of stages 1 and 2 is reduced, or a backward pass is over (`gradients.partitioned`)."""
        how, share = self.how, self.share_of
        assert how is not None and share is not None
        if isinstance(moment, Flush):
            for pieces in reduced_pieces(moment, how, share):
                self.touch(labels.ALL_REDUCE_BUFFER, *pieces)
            mine = [(key, size) for key, size in zip(moment.keys, moment.sizes, strict=True) if key in share.own]
            if not mine:
                return
            if how.master:
                self.touch(labels.GRADIENT_NORM, *(8 * share.own[key] for key, _ in mine[:1]))
            elif not how.contiguous:
                for _, size in mine:
                    self.take(labels.GRADIENT_PARTITION, size)
                    self._partition.append(size)
            elif not self._partition:
                whole = how.width * sum(self.numels[key] for key in share.own)
                self.take(labels.GRADIENT_PARTITION, whole)
                self._partition.append(whole)
            return
        if self._kept_partition:
            self.give(labels.GRADIENT_PARTITION, *self._partition)
        self._kept_partition = self._kept_partition or bool(self._partition)
        self._partition = []

    numels: dict[Any, int] = {}


def replay(job: Job, *, limit: int | None = None, expandable: bool = False, steps: int = MOST_STEPS) -> Replayed:
    """Replay a job whose peaks have a closed form, on a device whose allocator may reserve so many bytes (no limit if not given)."""
    engine = Engine.of(job)
    plan = training._plan(job, engine)
    allocator = CachingAllocator(limit, expandable_segments=expandable)
    facts = engine.facts
    streams = STREAMS.get(facts.wrapper, {}) if overlaps_communication(engine.config) else {}
    meter = Replay(plan.block, allocator, streams, engine.world_size)
    held = [a for a in between_steps(job, engine) if not a.on_host]
    buffers = [a for a in held if a.label == labels.MODEL_BUFFERS]
    for each in buffers:
        meter.take(each.label, *each.sizes)
    initial(engine, meter, zero_init=job.is_inside_zero_init, by_transformers=isinstance(job.profile.model, HuggingFaceSettings))
    skip = {labels.MODEL_BUFFERS, labels.PARAMETERS, labels.PERSISTENT_PARAMETERS, training.LOGITS, training.LOSS}
    for each in held:
        if each.label in skip or meter.held.get(each.label):
            continue
        if each.label[0] in LAZY:
            meter.lazy.append((each.label, deque(each.sizes)))
        else:
            meter.take(each.label, *each.sizes)
    is_third = facts.wrapper is Wrapper.ZERO3
    whole = training.program(plan.run, plan.precision, is_third, plan.memory_efficient_linear or not is_third, plan.block)
    if isinstance(plan.how, Reduction):
        meter.how, meter.share_of, meter.numels = plan.how, training.share(job, engine), training._numels(job.profile.model)
    ops = [[(_ops(section.events), shift) for section, shift in whole.sections]]
    before = None
    for number in range(steps):
        _step(plan, engine, meter, whole, ops[0], is_first=number == 0)
        now = meter.reserved, allocator.reserved_bytes, allocator.tail_bytes
        if now == before:
            break
        before = now
    return Replayed(meter.reserved, meter.allocated, allocator.retries, meter.shortage)


Op = tuple[str, Any, int]


@functools.cache
def _cached_ops(key: int) -> None: ...


def _ops(events: Sequence[Any]) -> list[Op]:
    out: list[Op] = []
    for kind, subject, size in events:
        if kind == "memory":
            if subject == GRADIENT and size > 0 and out and out[-1][0] == "drop":
                out[-1] = ("rename", out[-1][1], size)
            elif size > 0:
                out.append(("add", subject, size))
            else:
                out.append(("drop", subject, -size))
        else:
            out.append((kind, subject, size))
    return out


def _step(plan: Any, engine: Engine, meter: Replay, whole: Program, ops: Any, *, is_first: bool) -> None:
    meter._partition, meter._kept_partition = [], False
    gradients: Gradients | Gathers = training._gradients(plan, meter, whole)
    meter.log = None
    if isinstance(gradients, Gathers) and is_first:
        gradients.forget()
    handlers = training._handlers(gradients) | training._loop(meter, plan.kept)
    last = plan.micro_steps - 1
    for number in sorted({*range(min(last, training.SETTLED)), last}):
        gradients.start(is_boundary=number == last)
        _walk(ops, meter, handlers, plan.workspace if is_first and number == 0 else 0)
        gradients.finish()
        for label, size in whole.net.items():
            for kept, bytes_ in zip((training.LOGITS, training.LOSS), plan.kept, strict=True):
                if size == bytes_:
                    meter.rename(label, kept, size)
    if isinstance(gradients, Gathers):
        gradients.release_all()
    final: Any = gradients
    if isinstance(gradients, PartitionedGradients):
        final = meter.share_of
    meter.phase = Phase.STEP
    step(engine, meter, final)


def _walk(ops: Any, meter: Replay, handlers: dict[str, Handler], workspace: int) -> None:
    meter.phase = Phase.FORWARD
    from bf16prof.estimate.program import _shift
    workspaces = [workspace] if workspace else []
    add, drop = meter.add, meter.drop
    for section, shift in ops:
        for kind, subject, size in section:
            if kind == "add":
                add(subject, size)
            elif kind == "drop":
                drop(subject, size, newest=True)
            elif kind == "rename":
                meter.rename(subject, GRADIENT, size)
            elif kind == "compute":
                if workspaces:
                    meter.take(CUBLAS_WORKSPACES, workspaces.pop())
            else:
                if kind == "backward":
                    meter.phase = Phase.BACKWARD
                    if workspace:
                        workspaces.append(workspace)
                if kind in handlers:
                    handlers[kind](_shift(subject, shift) if shift and subject is not None and isinstance(subject, tuple) else subject, size)
