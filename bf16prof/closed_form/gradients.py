"""Stages 0 to 2: where the gradients of parameters go, from the moment they are there to the end of
backward.

References are to DeepSpeed 0.19.8, `deepspeed/runtime/`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from bf16prof.closed_form.engine import FP32_BYTES, FP64_BYTES
from bf16prof.closed_form.passes import Meter, Peak
from bf16prof.closed_form.strategy import Launched, Strategy, StrategySettings
from bf16prof.engine.labels import ALL_REDUCE_BUFFER, GRADIENT_NORM, GRADIENT_PARTITION, REDUCE_BUCKET
from bf16prof.models.autograd.events import GRADIENT, ParameterKey
from bf16prof.rounding import round_up
from bf16prof.vocabulary import Component, Label, Phase

if TYPE_CHECKING:
    from bf16prof.closed_form.program import Program
    from bf16prof.closed_form.walks import WalkPlan

CAST: Label = (Component.MASTER_GRADIENTS, "gradient cast to be accumulated")
MEMORY_OPT_ALLREDUCE_SIZE = 500_000_000
"""Stage 0 reduces so many elements at a time (engine.py)."""


@dataclass(frozen=True)
class AllReduction(StrategySettings):
    """Stage 0. `cast`: bytes of an element in communication where that is not the gradients' dtype,
    else 0."""

    cast: int = 0

    def strategy(self, plan: WalkPlan, meter: Meter, program: Program) -> Gradients:
        """Gradients of the parameters that are trained."""
        return Gradients(meter, plan.anatomy.trained, self.cast)


class Gradients(Strategy):
    """Stage 0: gradients stay where they are until the step; they are reduced at the end of the
    last backward."""

    def __init__(self, meter: Meter, numels: Mapping[ParameterKey, int], cast: int = 0) -> None:
        self.meter, self.numels, self.cast = meter, numels, cast
        self.waiting: dict[ParameterKey, int] = {}
        self.launched = Launched()
        self.is_boundary = True

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each gradient that waits where backward has made it."""
        return tuple(self.waiting.values())

    def start(self, *, is_boundary: bool) -> None:
        """A micro-step begins, perhaps the last before the optimizer's step."""
        self.launched = Launched()
        self.is_boundary = is_boundary

    def ready(self, key: ParameterKey, size: int) -> None:
        """A gradient is there: the tape has counted it. A later one is added to the first and
        freed."""
        if key in self.waiting:
            self.meter.give(GRADIENT, size)
        else:
            self.waiting[key] = size

    def finish(self) -> None:
        """The end of backward: `buffered_allreduce_fallback` copies buckets of gradients, in the
        order of the parameters, into flat ones and reduces each as soon as it holds too much
        (engine.py, allreduce_no_retain), cast if need be (allreduce_bucket)."""
        if not self.is_boundary:
            return
        bucket: list[ParameterKey] = []
        numel = 0
        for key in [key for key in self.numels if key in self.waiting]:
            bucket.append(key)
            numel += self.numels[key]
            if numel > MEMORY_OPT_ALLREDUCE_SIZE:
                self._all_reduce(bucket)
                bucket, numel = [], 0
        self._all_reduce(bucket)

    def _all_reduce(self, bucket: Sequence[ParameterKey]) -> None:
        if bucket:
            self.launched.reduced.append(tuple(bucket))
            cast = self.cast * sum(self.numels[key] for key in bucket)
            self.meter.touch(ALL_REDUCE_BUFFER, sum(self.waiting[key] for key in bucket), cast)


@dataclass(frozen=True)
class Accumulation(StrategySettings):
    """How BF16_Optimizer accumulates: bytes of an element in communication; `immediate`, each
    gradient as soon as it is there."""

    communication: int
    immediate: bool

    def strategy(self, plan: WalkPlan, meter: Meter, program: Program) -> AccumulatedGradients:
        """Gradients of the parameters that are trained."""
        return AccumulatedGradients(meter, plan.anatomy.trained, self)


class AccumulatedGradients(Gradients):
    """BF16_Optimizer (bf16_optimizer.py): gradients are added to fp32 ones of the whole model, and
    reduced as one at the last backward."""

    def __init__(self, meter: Meter, numels: Mapping[ParameterKey, int], how: Accumulation) -> None:
        super().__init__(meter, numels)
        self.how = how

    def ready(self, key: ParameterKey, size: int) -> None:
        """`accumulate_hp_grads_and_remove_lp`."""
        super().ready(key, size)
        if self.how.immediate:
            self._add(key)
            self.meter.give(GRADIENT, self.waiting.pop(key))

    def finish(self) -> None:
        """`update_hp_grads`, and `allreduce_bucket` of a single flat gradient (engine.py)."""
        for key in self.waiting:
            self._add(key)
        if self.is_boundary and self.how.communication != FP32_BYTES:
            self.meter.touch(ALL_REDUCE_BUFFER, self.how.communication * sum(self.numels.values()))

    def _add(self, key: ParameterKey) -> None:
        self.meter.touch(CAST, FP32_BYTES * self.numels[key])


@dataclass
class Bucket:
    """`IPGBucket`: parameters whose gradients wait to be reduced together."""

    keys: list[ParameterKey] = field(default_factory=list)
    elements: int = 0


@dataclass(frozen=True)
class GradientReduction(StrategySettings):
    """How stages 1 and 2 reduce, whatever the number of ranks.

    * `bucket_size`: elements of a bucket; `buffers`: buckets of each communication dtype.
    * `itemsize`: bytes of an element of the buckets.
    * `early`: as soon as a bucket is full (stage 2, `overlap_comm`); `always`: in every micro-step
      (stage 2).
    """

    bucket_size: int
    buffers: int
    contiguous: bool
    itemsize: int
    early: bool
    always: bool
    master: int = 0
    """Bytes of an element of the master gradients in host memory, when offloading; else 0."""
    scatters: bool = True
    """Whether slices go to the ranks that own them; else a bucket is all-reduced where it is
    (`reduce_scatter`)."""

    def strategy(self, plan: WalkPlan, meter: Meter, program: Program) -> PartitionedGradients:
        """Gradients of the parameters that are trained; the meter keeps a log."""
        meter.log = []
        communication = plan.communication_itemsizes()
        trained = plan.anatomy.trained
        return PartitionedGradients(meter, trained, {key: communication[key] for key in trained}, self)


@dataclass(eq=False)
class Flush:
    """A bucket is reduced: its parameters with the bytes of their gradients, and where in the
    program that happens."""

    keys: tuple[ParameterKey, ...]
    sizes: tuple[int, ...]
    elements: int
    communication: int
    """Bytes of an element while it is reduced."""
    most: int
    """Bytes that reducing it takes at most: a flat copy, and a cast of it."""
    at: Peak
    _reach: tuple[object, tuple[int, int]] | None = None

    def reach(self, spans: Mapping[ParameterKey, tuple[int, int]]) -> tuple[int, int]:
        """Where its parameters start and end in the flat buffer."""
        if self._reach is None or self._reach[0] is not spans:
            mine = [spans[key] for key in self.keys]
            self._reach = spans, (min(start for start, _ in mine), max(end for _, end in mine))
        return self._reach[1]


class PartitionedGradients(Gradients):
    """Stages 1 and 2 (zero/stage_1_and_2.py): gradients go through a bucket into the partition of
    this rank.

    What depends on the partition is left out, and written down as `Flush` and `END` in the meter's
    log (see `partitioned`).
    """

    END = "end of a backward pass"

    def __init__(
        self, meter: Meter, numels: Mapping[ParameterKey, int], communication: Mapping[ParameterKey, int], how: GradientReduction
    ) -> None:
        super().__init__(meter, numels)
        self.how, self._communication = how, communication
        self._buckets: dict[int, Bucket] = {itemsize: Bucket() for itemsize in sorted(set(communication.values()))}
        self._buffers: tuple[int, ...] = ()
        self._late: tuple[int, ...] = ()
        """Gradients too large for a bucket, which stage 1 lets go of at the end, unless they are
        copied to the partition."""

    def ready(self, key: ParameterKey, size: int) -> None:
        """`process_gradients`."""
        self._setup()
        super().ready(key, size)
        if self.how.early and (self.is_boundary or self.how.always):
            self._reduce(key)

    def finish(self) -> None:
        """`reduce_gradients` and `independent_gradient_partition_epilogue`."""
        if not (self.is_boundary or self.how.always):
            return
        if not self.how.early:
            for key in [key for key in self.numels if key in self.waiting]:
                self._reduce(key)
        for communication in self._buckets:
            self._flush(communication)
        self.meter.give(REDUCE_BUCKET, *self._buffers)
        self._buffers = ()
        self.meter.give(GRADIENT, *self._late)
        self._late = ()
        self.meter.interrupt(self.END)

    def _setup(self) -> None:
        """`setup_buckets`."""
        if not self._buffers and self.how.contiguous:
            self._buffers = (self.how.bucket_size * self.how.itemsize,) * self.how.buffers * len(self._buckets)
            self.meter.take(REDUCE_BUCKET, *self._buffers)

    def _reduce(self, key: ParameterKey) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`."""
        numel, communication = self.numels[key], self._communication[key]
        if self._buckets[communication].elements + numel > self.how.bucket_size:
            self._flush(communication)
        if self.how.contiguous and numel <= self.how.bucket_size:
            self.meter.give(GRADIENT, self.waiting[key])
            self.waiting[key] = 0
        elif self.how.contiguous and self.how.master:
            self.meter.touch(GRADIENT, self.waiting[key])  # a clone takes its place
        self._buckets[communication].keys.append(key)
        self._buckets[communication].elements += numel

    def _flush(self, communication: int) -> None:
        """`reduce_ipg_grads`."""
        bucket, self._buckets[communication] = self._buckets[communication], Bucket()
        if not bucket.keys:
            return
        meter = self.meter
        sizes = tuple(self.waiting.pop(key) for key in bucket.keys)
        at = Peak(meter.level, meter.section, meter.events, dict(meter.held))
        keys = tuple(bucket.keys)
        self.launched.reduced.append(keys)
        most = round_up(bucket.elements * (self.how.itemsize + communication), meter.block)
        meter.interrupt(Flush(keys, sizes, bucket.elements, communication, most, at))
        if self.how.always:
            meter.give(GRADIENT, *sizes)
        else:
            self._late += sizes


@dataclass(frozen=True)
class Share:
    """A rank's part of the flat buffer of stages 1 and 2: where every parameter is in it, and which
    partition is its own, in elements."""

    spans: Mapping[ParameterKey, tuple[int, int]]
    partition: int
    rank: int = 0

    @functools.cached_property
    def parts(self) -> dict[ParameterKey, int]:
        """Elements of each parameter that lie in the partition."""
        first, last = self.rank * self.partition, (self.rank + 1) * self.partition
        parts = {}
        for key, (start, end) in self.spans.items():
            if start >= last:
                break
            if end > first:
                parts[key] = min(end, last) - max(start, first)
        return parts

    def ranks(self, key: ParameterKey) -> range:
        """The ranks in whose partitions a parameter lies."""
        start, end = self.spans[key]
        return range(start // self.partition, (end - 1) // self.partition + 1)

    def chunks(self, keys: Sequence[ParameterKey], bucket_size: int) -> Iterator[tuple[int, int]]:
        """What is reduced at once: elements, and slices, one per change of rank (`average_tensor`,
        `allreduce_and_scatter`)."""
        numel = slices = 0
        last = -1
        for key in keys:
            start, end = self.spans[key]
            for rank in self.ranks(key):
                if rank != last and numel > bucket_size:
                    yield numel, slices
                    numel = slices = 0
                slices += rank != last
                numel += min(end, (rank + 1) * self.partition) - max(start, rank * self.partition)
                last = rank
        yield numel, slices


class Found(NamedTuple):
    """A level that is reached: the peak of the walk that it comes from, and what the partition
    changes about it."""

    level: int
    peak: Peak
    partition: int
    """Bytes of the partition then."""
    freed: int
    """Bytes of gradients that are gone already, because they have been copied to the partition."""
    more: int = 0
    """Bytes that are taken for a moment, and what for."""
    label: Label = ALL_REDUCE_BUFFER


def partitioned(walked: Meter, numels: Mapping[ParameterKey, int], how: GradientReduction, share: Share) -> Meter:
    """The levels and peaks of `walked` with what depends on the partition filled in.

    The first bucket that holds a parameter of this rank brings a buffer for all of them
    (`copy_grads_in_partition`); those of later micro-steps are added to the first.
    """
    whole = how.itemsize * sum(numels[key] for key in share.parts)
    found: dict[Phase, Found] = {}
    block = walked.block
    partition = freed = new = kept = before = 0
    not_mine = (share.rank + 1) * share.partition

    def see(phase: Phase, peak: Peak, more: int = 0, label: Label = ALL_REDUCE_BUFFER) -> None:
        level = peak.level + partition - freed + round_up(more, block)
        if phase not in found or level > found[phase].level:
            found[phase] = Found(level, peak, partition, freed, more, label)

    for moment in walked.log or ():
        if isinstance(moment, tuple):
            see(*moment)
        elif isinstance(moment, Flush):
            if moment.at.level + partition - freed + moment.most > found[Phase.BACKWARD].level:
                see(Phase.BACKWARD, moment.at, max(map(sum, reduced_pieces(moment, how, share))))
            if moment.reach(share.spans)[0] >= not_mine:
                continue  # nothing in it is this rank's
            if offloaded := _offloaded(moment, how, share):
                see(Phase.BACKWARD, moment.at, offloaded, GRADIENT_NORM)
            if taken := _taken(moment, how, share, whole, new):
                partition, new = partition + round_up(taken, block), new + taken
                see(Phase.BACKWARD, moment.at)
            if not how.always:
                freed += _moved(moment, share, block)
        else:
            freed = 0  # the walk has let go of them as well
            before = kept
            partition, kept, new = (partition - round_up(new, block), kept, 0) if kept else (partition, new, 0)
    return _filled(walked, found, partition, before)


def _taken(flush: Flush, how: GradientReduction, share: Share, whole: int, already: int) -> int:
    """Bytes that the partition takes when a bucket is reduced."""
    if how.master:
        return 0  # it is in host memory
    if how.contiguous:
        return whole if not already and any(key in share.parts for key in flush.keys) else 0
    return sum(size for key, size in zip(flush.keys, flush.sizes, strict=True) if key in share.parts)


def _offloaded(flush: Flush, how: GradientReduction, share: Share) -> int:
    """What moving a gradient to the host takes: its norm in fp64, then a cast
    (`set_norm_for_param_grad_in_gpu`)."""
    if not how.master:
        return 0
    return FP64_BYTES * max((share.parts.get(key, 0) for key in flush.keys), default=0)


def _moved(flush: Flush, share: Share, block: int) -> int:
    """Bytes of gradients that are freed because they have been copied to the partition, in whole
    blocks."""
    return sum(round_up(size, block) for key, size in zip(flush.keys, flush.sizes, strict=True) if key in share.parts)


def _filled(walked: Meter, found: Mapping[Phase, Found], partition: int, before: int) -> Meter:
    meter = walked.copy()
    meter.level, meter.log = walked.level + partition, None
    meter.held = walked.held | {GRADIENT_PARTITION: partition}
    for phase, (level, peak, part, freed, more, label) in found.items():
        held = dict(peak.held)
        for name, size in ((GRADIENT_PARTITION, part), (GRADIENT, -freed), (label, more)):
            held[name] = held.get(name, 0) + size
        meter.peaks[phase] = Peak(level, peak.section, peak.events, held)
    meter.peak = meter.peaks[meter.phase]
    meter.ends[Phase.FORWARD] += before
    meter.ends[Phase.BACKWARD] += partition
    return meter


def reduced_pieces(flush: Flush, how: GradientReduction, share: Share) -> Iterator[tuple[int, ...]]:
    """What reducing a bucket takes, one chunk after the other: a flat copy of slices of several
    ranks, and a cast to the communication dtype."""
    cast = flush.communication if flush.communication != how.itemsize else 0
    if not how.scatters:
        yield (flush.elements * cast,)
        return
    first, last = flush.reach(share.spans)
    alone = first // share.partition == (last - 1) // share.partition
    if alone or flush.elements <= how.bucket_size:
        yield (0 if alone else flush.elements * how.itemsize, flush.elements * cast)
        return
    for numel, slices in share.chunks(flush.keys, how.bucket_size):
        yield (numel * how.itemsize if slices > 1 else 0, numel * cast)
