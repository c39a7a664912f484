"""What the caching allocator reserves for a job: the allocations and frees of the closed form, replayed through its model.

The walk through a step (`passes.py`) knows what is allocated and freed in which order. `Replay` is a meter that makes each storage a block
of `allocator.CachingAllocator`, on the streams that DeepSpeed uses. Init, the first step and further steps are replayed until the allocator
has settled, as the dry run does (`dry_run/repeat.py`).

What a replay does not know: which of several equal blocks is freed first (taken to be the oldest of the engine's, the newest of the
model's), small tensors that no closed form counts, and how long a stream holds what has been freed.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.allocator import AllocatorOutOfMemory, Block, CachingAllocator
from bf16prof.cases import Job
from bf16prof.closed_form.first_step import LAZY
from bf16prof.closed_form.gathers import Gathers
from bf16prof.closed_form.gradients import Flush, GradientReduction, Key, Share, reduced_pieces
from bf16prof.closed_form.initial import initial
from bf16prof.closed_form.kept import between_steps
from bf16prof.closed_form.passes import Handler, Meter
from bf16prof.closed_form.program import Section, shifted
from bf16prof.closed_form.steady import FP64_BYTES, Engine
from bf16prof.closed_form.step import step
from bf16prof.closed_form.training import Walked, share, strategy
from bf16prof.engine import labels
from bf16prof.engine.config import Wrapper, overlaps_communication
from bf16prof.models.autograd.tape import BY_THE_LOOP, GRADIENT, LOSS
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.records import Label, Phase
from bf16prof.rounding import ceil_div

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
`reduce_and_partition_stream`; stage_1_and_2.py `reduction_stream`). Blocks of one stream are not given to another."""

OUTPUTS = {"logits", "loss"}
"""Events at which the training loop replaces what it holds of the last micro-step."""

HELD_ELSEWHERE = {labels.PARAMETERS, labels.PERSISTENT_PARAMETERS, LOSS}
"""Besides outputs, what is alive between steps and allocated by the walk itself: in init, after the first step, or in its forward pass."""


@dataclass(frozen=True)
class Replayed:
    """What the allocator did.

    * `reserved_bytes`: the most that it reserved, of which `fragmentation_bytes` were not allocated then.
    * `allocated_bytes`: the most that was allocated, remainders of blocks included.
    * `shortage`: the phase in which the limit did not suffice, and the allocator's numbers; after it there is no limit.
    * `retries`: allocations that found room only after the cache was freed.
    """

    reserved_bytes: int
    fragmentation_bytes: int
    allocated_bytes: int
    retries: int
    shortage: tuple[Phase, AllocatorOutOfMemory] | None = None


class Replay(Meter):
    """A meter whose storages are blocks of a caching allocator; `ranks`: so many share what is partitioned."""

    def __init__(self, block: int, allocator: CachingAllocator, streams: Mapping[Label, int], ranks: int) -> None:
        super().__init__(block)
        self.allocator = allocator
        self.lazy: list[tuple[Label, deque[int]]] = []
        """States that the optimizer makes when it first updates a tensor: of each label the sizes."""
        self.buckets: BucketsOfPartition | None = None
        self.reserved = self.allocated_then = self.allocated = 0
        self.shortage: tuple[Phase, AllocatorOutOfMemory] | None = None
        self._streams, self._ranks = streams, ranks
        self._streams_now: Mapping[Label, int] = {}
        self._blocks: dict[Label, dict[int, deque[Block]]] = {}

    def begin(self, phase: Phase) -> None:
        """A phase begins."""
        self.phase = phase
        self._streams_now = self._streams if phase in {Phase.FORWARD, Phase.BACKWARD} else {}

    def see(self, level: int, events: int) -> None:
        """Levels are the allocator's here."""

    def add(self, label: Label, size: int) -> None:
        """Allocate a block."""
        stream, allocator = self._streams_now.get(label, 0), self.allocator
        try:
            block = allocator.allocate(size, stream)
        except AllocatorOutOfMemory as error:
            self.shortage = self.phase, error
            allocator.lift_limit()
            block = allocator.allocate(size, stream)
        if (known := self._blocks.get(label)) is None:  # `setdefault` would make a queue for every block: this runs some ten thousand times
            known = self._blocks[label] = {}
        if (same := known.get(size)) is None:
            same = known[size] = deque()
        same.append(block)
        self.allocated = max(self.allocated, allocator.allocated_bytes)
        if allocator.reserved_bytes > self.reserved:
            self.reserved, self.allocated_then = allocator.reserved_bytes, allocator.allocated_bytes

    def drop(self, label: Label, size: int, *, newest: bool = False) -> None:
        """Free a block of that label and size; where there is none, as many of the label as make up the size."""
        known = self._blocks.get(label)
        if not known:
            return  # not there yet in the first step
        if same := known.get(size):
            self.allocator.free(same.pop() if newest else same.popleft())
            return
        for other, queue in known.items():
            while queue and 0 < other <= size:
                self.allocator.free(queue.popleft())
                size -= other

    def rename(self, old: Label, new: Label, size: int) -> None:
        """The newest block of a label is for something else from now on."""
        if same := self._blocks.get(old, {}).get(size):
            self._blocks.setdefault(new, {}).setdefault(size, deque()).append(same.pop())

    def take(self, label: Label, *sizes: int) -> None:
        """The engine allocates storages of these sizes."""
        for size in filter(None, sizes):
            self.add(label, size)
        self.held[label] = self.held.get(label, 0) + sum(sizes)

    def give(self, label: Label, *sizes: int) -> None:
        """The engine frees them."""
        for size in filter(None, sizes):
            self.drop(label, size)
        self.held[label] = self.held.get(label, 0) - sum(sizes)

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
        """A bucket of stages 1 and 2 is reduced, or a backward pass is over."""
        assert self.buckets is not None, "only stages 1 and 2 interrupt"
        self.buckets.at(moment, self)


class BucketsOfPartition:
    """What stages 1 and 2 allocate when a bucket is reduced: the part of `gradients.partitioned` that depends on the partition."""

    def __init__(self, numels: Mapping[Key, int], how: GradientReduction, share: Share) -> None:
        self._numels, self._how, self.share = numels, how, share
        self._new: list[int] = []
        self._is_kept = False

    def begin_step(self) -> None:
        """The gradients of the last step are gone."""
        self._new, self._is_kept = [], False

    def at(self, moment: object, meter: Replay) -> None:
        """`reduce_ipg_grads`; at the end of a backward pass the partition of later micro-steps has been added to the first."""
        if isinstance(moment, Flush):
            self._flush(moment, meter)
            return
        if self._is_kept:
            meter.give(labels.GRADIENT_PARTITION, *self._new)
        self._is_kept = self._is_kept or bool(self._new)
        self._new = []

    def _flush(self, flush: Flush, meter: Replay) -> None:
        how, own = self._how, self.share.own
        for pieces in reduced_pieces(flush, how, self.share):
            meter.touch(labels.ALL_REDUCE_BUFFER, *pieces)
        mine = [(key, size) for key, size in zip(flush.keys, flush.sizes, strict=True) if key in own]
        if not mine:
            return
        if how.master:
            meter.touch(labels.GRADIENT_NORM, FP64_BYTES * max(own[key] for key, _ in mine))
            return
        taken = [size for _, size in mine]
        if how.contiguous:
            taken = [] if self._new else [how.width * sum(self._numels[key] for key in own)]
        meter.take(labels.GRADIENT_PARTITION, *taken)
        self._new += taken


def replay(
    job: Job, engine: Engine, done: Walked, *, limit: int | None = None, expandable: bool = False, to_the_end: bool = True
) -> Replayed:
    """Replay a job, from the walk through a step, on a device whose allocator may reserve so many bytes (no limit if not given).

    Not `to_the_end`: no further than to the step in which the limit does not suffice.
    """
    allocator = CachingAllocator(limit, expandable_segments=expandable)
    streams = STREAMS.get(engine.facts.wrapper, {}) if overlaps_communication(engine.config) else {}
    plan = done.plan
    meter = Replay(plan.block, allocator, streams, engine.world_size)
    _init(job, engine, meter, HELD_ELSEWHERE | {label for label, _ in plan.outputs})
    if isinstance(plan.how, GradientReduction):
        meter.buckets = BucketsOfPartition(engine.anatomy.trained, plan.how, share(engine))
    before: tuple[int, ...] = ()
    for number in range(MOST_STEPS):
        _step(engine, meter, done, is_first=number == 0)
        now = meter.reserved, allocator.reserved_bytes, allocator.tail_bytes
        if now == before or (meter.shortage and not to_the_end):
            break
        before = now
    return Replayed(meter.reserved, meter.reserved - meter.allocated_then, meter.allocated, allocator.retries, meter.shortage)


def _init(job: Job, engine: Engine, meter: Replay, held_elsewhere: Collection[Label]) -> None:
    """Init, and what is there from the first step on but for what it makes itself."""
    held = [each for each in between_steps(job, engine) if not each.on_host]
    for each in held:
        if each.label == labels.MODEL_BUFFERS:
            meter.take(each.label, *each.sizes)
    initial(engine, meter, zero_init=job.is_inside_zero_init, by_transformers=isinstance(job.profile.model, HuggingFaceSettings))
    for each in held:
        if each.label in held_elsewhere or meter.held.get(each.label):
            continue
        if each.label[0] in LAZY:
            meter.lazy.append((each.label, deque(each.sizes)))
        else:
            meter.take(each.label, *each.sizes)


def _step(engine: Engine, meter: Replay, done: Walked, *, is_first: bool) -> None:
    """A whole optimizer step; of several micro-steps those that `training._walked` walks."""
    plan = done.plan
    gradients, handlers = strategy(plan, meter, done.program)
    if isinstance(gradients, Gathers) and is_first:
        gradients.forget()
    if meter.buckets is not None:
        meter.buckets.begin_step()
    for number, is_last in plan.walked_micro_steps():
        gradients.start(is_boundary=is_last)
        if is_first and not number:  # the loop has no outputs yet to let go of
            _micro_step(done, meter, {kind: handler for kind, handler in handlers.items() if kind not in OUTPUTS}, plan.workspace)
        else:
            _micro_step(done, meter, handlers, 0)
        gradients.finish()
    if isinstance(gradients, Gathers):
        gradients.release_all()
    meter.ends[Phase.BACKWARD] = meter.level
    step(engine, meter, gradients if meter.buckets is None else meter.buckets.share)


def _micro_step(done: Walked, meter: Replay, handlers: Mapping[str, Handler], workspace: int) -> None:
    """Forward and backward once. `workspace`: of cuBLAS, for each of the two threads when it multiplies its first matrices."""
    meter.begin(Phase.FORWARD)
    missing = [workspace] if workspace else []
    for section, layers in done.program.sections:
        for kind, subject, size in _operations(section):
            if kind == "add":
                meter.add(subject, size)
            elif kind == "drop":
                meter.drop(subject, size, newest=True)
            elif kind == "rename":
                old, new = subject
                meter.rename(old, new, size)
            elif kind == "compute":
                meter.take(labels.CUBLAS_WORKSPACES, *missing)
                missing.clear()
            else:
                if kind == "backward":
                    meter.begin(Phase.BACKWARD)
                    missing += [workspace] if workspace else []
                if kind in handlers:
                    handlers[kind](shifted(subject, layers), size)


Operation = tuple[str, Any, int]


@functools.lru_cache(maxsize=256)
def _operations(section: Section) -> Sequence[Operation]:
    """The events of a section, memory as what is added and dropped. A storage that gets another label (a parameter's gradient, what the
    loop keeps) is dropped and added in one (`Tape.hand_over`, `Tape.keep`), and stays where it is."""
    return tuple(_told_apart(section))


def _told_apart(section: Section) -> Iterator[Operation]:
    dropped: Operation | None = None
    for kind, subject, size in section.events:
        if dropped is not None:
            is_relabelled = kind == "memory" and size == dropped[2] and _is_kept(subject)
            yield ("rename", (dropped[1], subject), size) if is_relabelled else dropped
            dropped = None
            if is_relabelled:
                continue
        if kind != "memory":
            yield kind, subject, size
        elif size > 0:
            yield "add", subject, size
        elif size:
            dropped = "drop", subject, -size
    if dropped is not None:
        yield dropped


def _is_kept(label: Label) -> bool:
    """Whether a storage of the model's gets this label when somebody else keeps it."""
    return label == GRADIENT or label[1].endswith(BY_THE_LOOP)
