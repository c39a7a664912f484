"""What the caching allocator reserves for a job: the allocations and frees of the closed form,
replayed through its model.

The walk through a step (`passes.py`) knows what is allocated and freed in which order. `Requests`
is a meter that writes this down, on the streams that DeepSpeed uses, and here
`allocator.CachingAllocator` is asked for it. Init, the first step and further steps are replayed
until the allocator has settled, as the dry run does (`dry_run/repeat.py`).

What a replay does not know: which of several equal blocks is freed first (taken to be the oldest of
the engine's, the newest of the model's), small tensors that no closed form counts, and how long a
stream holds what has been freed.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.allocator import AllocatorOutOfMemory, Block, CachingAllocator
from bf16prof.cases import Job
from bf16prof.closed_form.between_steps import between_steps
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.first_step import LAZY
from bf16prof.closed_form.initial import initial
from bf16prof.closed_form.passes import Handler
from bf16prof.closed_form.program import Section, shifted
from bf16prof.closed_form.requests import STREAM_BITS, Requests, RequestScript
from bf16prof.closed_form.strategy import Strategy
from bf16prof.closed_form.training import coordinated, loop, step
from bf16prof.closed_form.walks import Walked
from bf16prof.closed_form.wrappers import wrapper_of
from bf16prof.closed_form.written import Retelling
from bf16prof.engine import labels
from bf16prof.engine.config import overlaps_communication
from bf16prof.models.autograd.events import BY_THE_LOOP, GRADIENT, LOSS
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.vocabulary import Label, Phase

MOST_STEPS = 14
"""As many as the dry run does: two, and twelve that repeat."""

OUTPUTS = {"logits", "loss"}
"""Events at which the training loop replaces what it holds of the last micro-step."""

REMEMBERED = 16
"""So many replays are remembered: fp16 asks the allocator for what bf16 does, and a search asks
twice for some jobs."""

HELD_ELSEWHERE = {labels.PARAMETERS, labels.PERSISTENT_PARAMETERS, LOSS}
"""Besides outputs, what is alive between steps and allocated by the walk itself: in init, after the
first step, or in its forward pass."""


@dataclass(frozen=True)
class Replayed:
    """What the allocator did.

    * `reserved_bytes`: the most that it reserved, of which `fragmentation_bytes` were not allocated
      then.
    * `allocated_bytes`: the most that was allocated, remainders of blocks included.
    * `shortage`: the phase in which the limit did not suffice, and the allocator's numbers; after
      it there is no limit.
    * `retries`: allocations that found room only after the cache was freed.
    """

    reserved_bytes: int
    fragmentation_bytes: int
    allocated_bytes: int
    retries: int
    shortage: tuple[Phase, AllocatorOutOfMemory] | None = None


def replay(
    job: Job, engine: Engine, done: Walked, *, limit: int | None = None, expandable: bool = False, to_the_end: bool = True
) -> Replayed:
    """Replay a job, from the walk through a step, on a device whose allocator may reserve so many
    bytes (no limit if not given).

    Not `to_the_end`: no further than to the step in which the limit does not suffice.
    """
    wrapper = wrapper_of(engine)
    streams = wrapper.streams if overlaps_communication(engine.config) else {}
    plan = done.plan
    meter = Requests(plan.block, streams, engine.world_size)
    _init(job, engine, meter, HELD_ELSEWHERE | {label for label, _ in plan.outputs})
    init = meter.cut()
    meter.buckets = wrapper.buckets(done)
    steps = (_step(engine, meter, done, is_first=number == 0) for number in range(MOST_STEPS))
    first, state = next(steps), meter.state()
    second = next(steps)
    if meter.state() == state:
        return _settled((init, first, second), limit, expandable, to_the_end)
    return _played(itertools.chain((init, first, second), steps), limit, expandable, to_the_end)


@functools.lru_cache(maxsize=REMEMBERED)
def _settled(
    scripts: tuple[RequestScript, RequestScript, RequestScript], limit: int | None, expandable: bool, to_the_end: bool
) -> Replayed:
    """Init, the first step, and further ones that are all alike."""
    return _played((*scripts, *[scripts[-1]] * (MOST_STEPS - 2)), limit, expandable, to_the_end)


def _played(scripts: Iterable[RequestScript], limit: int | None, expandable: bool, to_the_end: bool) -> Replayed:
    device = PlayedDevice(CachingAllocator(limit, expandable_segments=expandable))
    allocator, before = device.allocator, (0, 0, 0)
    for number, script in enumerate(scripts):
        device.play(script)
        now = device.reserved, allocator.reserved_bytes, allocator.tail_bytes
        if (number > 1 and now == before) or (number and device.shortage and not to_the_end):  # number 0 is init
            break
        before = now
    fragmentation = device.reserved - device.allocated_then
    return Replayed(device.reserved, fragmentation, device.allocated, allocator.retries, device.shortage)


class PlayedDevice:
    """A caching allocator that is asked for what scripts say, and the most that it reserves and has
    allocated."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self.reserved = self.allocated_then = self.allocated = 0
        self.shortage: tuple[Phase, AllocatorOutOfMemory] | None = None
        self._blocks: list[Block] = []

    def play(self, script: RequestScript) -> None:
        """Everything that is asked for in init or in a step."""
        for phase, empties_cache, numbers in script.stretches:
            if empties_cache:
                self.allocator.empty_cache()
            self._play(phase, array("q", numbers))
        self._blocks = [self._blocks[place] for place in script.left]

    def _play(self, phase: Phase, numbers: Iterable[int]) -> None:
        allocator, blocks, most = self.allocator, self._blocks, self.allocated
        allocate, free, stream = allocator.allocate, allocator.free, (1 << STREAM_BITS) - 1
        for number in numbers:  # this runs a million times in a search
            if number < 0:
                free(blocks[~number])
                continue
            try:
                block = allocate(number >> STREAM_BITS, number & stream)
            except AllocatorOutOfMemory as error:
                self.shortage = phase, error
                allocator.lift_limit()
                block = allocate(number >> STREAM_BITS, number & stream)
            blocks.append(block)
            if allocator.allocated_bytes > most:  # noqa: PLR1730 - a call of `max` takes longer than the rest
                most = allocator.allocated_bytes
            if allocator.reserved_bytes > self.reserved:
                self.reserved, self.allocated_then = allocator.reserved_bytes, allocator.allocated_bytes
        self.allocated = most


def _init(job: Job, engine: Engine, meter: Requests, held_elsewhere: Collection[Label]) -> None:
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


def _step(engine: Engine, meter: Requests, done: Walked, *, is_first: bool) -> RequestScript:
    """What a whole optimizer step asks for; of several micro-steps those that `training._walked`
    walks."""
    plan, known = done.plan, coordinated(done.plan, done.program, is_first=is_first)
    if known is not None:
        retelling = Retelling(known.steps, known.end, known.kinds, meter)
        _micro_steps(done, meter, retelling, retelling.handlers | loop(meter, plan), is_first=is_first)
        retelling.release_all()
        step(wrapper_of(engine), meter, known.gathers)
        return meter.cut()
    gradients = plan.strategy_settings.strategy(plan, meter, done.program)
    handlers = gradients.handlers() | loop(meter, plan)
    if meter.buckets is not None:
        meter.buckets.begin_step()
    _micro_steps(done, meter, gradients, handlers, is_first=is_first)
    step(wrapper_of(engine), meter, gradients)
    return meter.cut()


def _micro_steps(done: Walked, meter: Requests, engine: Strategy | Retelling, handlers: Mapping[str, Handler], *, is_first: bool) -> None:
    for number, is_last in done.plan.walked_micro_steps():
        engine.start(is_boundary=is_last)
        if is_first and not number:  # the loop has no outputs yet to let go of
            at_first = {kind: handler for kind, handler in handlers.items() if kind not in OUTPUTS}
            _micro_step(done, meter, at_first, done.plan.workspace)
        else:
            _micro_step(done, meter, handlers, 0)
        engine.finish()


def _micro_step(done: Walked, meter: Requests, handlers: Mapping[str, Handler], workspace: int) -> None:
    """Forward and backward once. `workspace`: of cuBLAS, for each of the two threads when it
    multiplies its first matrices."""
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
    """The events of a section, memory as what is added and dropped. A storage that gets another
    label (a parameter's gradient, what the loop keeps) is dropped and added in one
    (`Tape.hand_over`, `Tape.keep`), and stays where it is."""
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
