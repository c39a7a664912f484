"""What a job asks of the caching allocator, written down: which storages are allocated and freed,
in which order.

It does not depend on where the allocator puts anything, so an optimizer step that asks for the same
again is written down once.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from bf16prof.closed_form.engine import FP64_BYTES
from bf16prof.closed_form.gradients import Flush, GradientReduction, Share, reduced_pieces
from bf16prof.closed_form.passes import Meter
from bf16prof.engine import labels
from bf16prof.models.autograd.events import ParameterKey
from bf16prof.rounding import ceil_div
from bf16prof.vocabulary import Label, Phase

STREAM_BITS = 2
"""Of a request's number, for the stream; the bytes are above them."""


class RequestStretch(NamedTuple):
    """Requests in one phase. `numbers`: as 64-bit integers, of an allocation its bytes and stream,
    of a free the complement of its place among the storages: those that were there before come
    first, then all that are allocated, in their order."""

    phase: Phase
    empties_cache: bool
    """Whether the cache is emptied before."""
    numbers: bytes


class RequestScript(NamedTuple):
    """The requests of init or of a step; `left`: the places of those storages that are there
    afterwards."""

    stretches: tuple[RequestStretch, ...]
    left: tuple[int, ...]


class Requests(Meter):
    """A meter that writes down what is asked of the allocator; `ranks`: so many share what is
    partitioned."""

    def __init__(self, block: int, streams: Mapping[Label, int], ranks: int) -> None:
        super().__init__(block)
        self.lazy: list[tuple[Label, deque[int]]] = []
        """States that the optimizer makes when it first updates a tensor: of each label the
        sizes."""
        self.buckets: BucketsOfPartition | None = None
        self._streams, self._ranks = streams, ranks
        self._streams_now: Mapping[Label, int] = {}
        self._places: dict[Label, dict[int, deque[int]]] = {}
        self._count = 0
        self._stretches: list[RequestStretch] = []
        self._numbers: list[int] = []
        self._empties_cache = False

    def begin(self, phase: Phase) -> None:
        """A phase begins."""
        self._close()
        self.phase = phase
        self._streams_now = self._streams if phase in {Phase.FORWARD, Phase.BACKWARD} else {}

    def see(self, level: int, events: int) -> None:
        """Levels are the allocator's here."""

    def add(self, label: Label, size: int) -> None:
        """Allocate a storage."""
        known = self._places.get(label)  # `setdefault` would make a queue for every storage: this runs some ten thousand times
        if known is None:
            known = self._places[label] = {}
        if (same := known.get(size)) is None:
            same = known[size] = deque()
        same.append(self._count)
        self._count += 1
        self._numbers.append(size << STREAM_BITS | self._streams_now.get(label, 0))

    def drop(self, label: Label, size: int, *, newest: bool = False) -> None:
        """Free a storage of that label and size; where there is none, as many of the label as make
        up the size."""
        known = self._places.get(label)
        if not known:
            return  # not there yet in the first step
        if same := known.get(size):
            self._numbers.append(~(same.pop() if newest else same.popleft()))
            return
        for other, queue in known.items():
            while queue and 0 < other <= size:
                self._numbers.append(~queue.popleft())
                size -= other

    def rename(self, old: Label, new: Label, size: int) -> None:
        """The newest storage of a label is for something else from now on."""
        if same := self._places.get(old, {}).get(size):
            self._places.setdefault(new, {}).setdefault(size, deque()).append(same.pop())

    def take(self, label: Label, *sizes: int) -> None:
        """The engine allocates storages of these sizes."""
        for size in sizes:
            if size:
                self.add(label, size)
        self.held[label] = self.held.get(label, 0) + sum(sizes)

    def give(self, label: Label, *sizes: int) -> None:
        """The engine frees them."""
        for size in sizes:
            if size:
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
        self._close()
        self._empties_cache = True

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

    def state(self) -> object:
        """All that what is written from now on depends on: where it is what it was, the same
        requests come again."""
        counts = [(label, size, len(queue)) for label, size, queue in self._queues() if queue]
        partition = self.held.get(labels.GRADIENT_PARTITION, 0)  # which the step gives back whole
        return counts, [list(sizes) for _, sizes in self.lazy], partition

    def cut(self) -> RequestScript:
        """What has been written since the last cut."""
        self._close()
        left: list[int] = []
        for _, _, queue in self._queues():
            first = len(left)
            left += queue
            queue.clear()
            queue.extend(range(first, len(left)))
        script = RequestScript(tuple(self._stretches), tuple(left))
        self._stretches, self._count = [], len(left)
        return script

    def _close(self) -> None:
        if self._numbers or self._empties_cache:
            self._stretches.append(RequestStretch(self.phase, self._empties_cache, array("q", self._numbers).tobytes()))
            self._numbers, self._empties_cache = [], False

    def _queues(self) -> Iterator[tuple[Label, int, deque[int]]]:
        for label, known in self._places.items():
            for size, queue in known.items():
                yield label, size, queue


class BucketsOfPartition:
    """What stages 1 and 2 allocate when a bucket is reduced: the part of `gradients.partitioned`
    that depends on the partition."""

    def __init__(self, numels: Mapping[ParameterKey, int], how: GradientReduction, share: Share) -> None:
        self._numels, self._how, self.share = numels, how, share
        self._new: list[int] = []
        self._is_kept = False

    def begin_step(self) -> None:
        """The gradients of the last step are gone."""
        self._new, self._is_kept = [], False

    def at(self, moment: object, meter: Requests) -> None:
        """`reduce_ipg_grads`; at the end of a backward pass the partition of later micro-steps has
        been added to the first."""
        if isinstance(moment, Flush):
            self._flush(moment, meter)
            return
        if self._is_kept:
            meter.give(labels.GRADIENT_PARTITION, *self._new)
        self._is_kept = self._is_kept or bool(self._new)
        self._new = []

    def _flush(self, flush: Flush, meter: Requests) -> None:
        how, parts = self._how, self.share.parts
        for pieces in reduced_pieces(flush, how, self.share):
            meter.touch(labels.ALL_REDUCE_BUFFER, *pieces)
        mine = [(key, size) for key, size in zip(flush.keys, flush.sizes, strict=True) if key in parts]
        if not mine:
            return
        if how.master:
            meter.touch(labels.GRADIENT_NORM, FP64_BYTES * max(parts[key] for key, _ in mine))
            return
        taken = [size for _, size in mine]
        if how.contiguous:
            taken = [] if self._new else [how.itemsize * sum(self._numels[key] for key in parts)]
        meter.take(labels.GRADIENT_PARTITION, *taken)
        self._new += taken
