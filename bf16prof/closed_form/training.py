"""A training step of a job: its program, walked with the strategy of its ZeRO stage; the peaks of forward, backward and step.

A walk does not depend on the number of ranks, but for what follows from padding at stage 3 and from the partition at stages 1 and 2; so
walks are remembered, and the rest is filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import Anatomy
from bf16prof.closed_form.first_step import raise_to_first_step
from bf16prof.closed_form.gathers import Gathers, GatherSettings, owners, padding_bytes
from bf16prof.closed_form.gradients import (
    AccumulatedGradients,
    Accumulation,
    GradientReduction,
    Gradients,
    Key,
    Launched,
    PartitionedGradients,
    Share,
    partitioned,
)
from bf16prof.closed_form.kept import kept_by_the_loop
from bf16prof.closed_form.layout import cut_order, dealt_out, flat_spans, persistent_places
from bf16prof.closed_form.leaves import Leaves
from bf16prof.closed_form.passes import REMEMBERED, Handler, Meter, close, walk
from bf16prof.closed_form.program import Program, key_of, program, recorded, run_of
from bf16prof.closed_form.steady import Engine, block_bytes
from bf16prof.closed_form.step import step, waiting_norms
from bf16prof.closed_form.written import Action, Player, Writing, WrittenMicroStep
from bf16prof.engine.config import Wrapper, dtype_bytes, offloads_optimizer, offloads_parameters, overlaps_communication
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.engine.workspace import cublas_workspace_bytes
from bf16prof.models.autograd.tape import LOSS, Precision
from bf16prof.models.shapes import TIED_HEAD
from bf16prof.models.tapes import ForwardRun
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.records import Device, Label, Phase

SETTLED = 2
"""Micro-steps after which those before the last repeat."""
NEGLIGIBLE = 2**16
"""Bytes of padding that do not tell one number of ranks from another."""


@dataclass(frozen=True)
class WalkPlan:
    """Everything that a walk depends on. `how`: of stage 3, of stages 1 and 2, of BF16_Optimizer, or `None` at stage 0."""

    anatomy: Anatomy
    run: ForwardRun
    precision: Precision
    block: int
    micro_steps: int
    outputs: tuple[tuple[Label, int], ...]
    """What the loop holds of a model's outputs until it has new ones: bytes by variable; none where it does not keep them."""
    loss: int
    """Bytes of the loss that it holds."""
    wires: tuple[int, int]
    """Bytes of an element of a gradient when it is reduced: of parameters that autocast casts, and of the others."""
    casts_to_reduce: bool
    """Whether gradients are reduced in another dtype than their own."""
    how: GatherSettings | GradientReduction | Accumulation | None
    memory_efficient_linear: bool
    workspace: int
    """Bytes of the cuBLAS workspace of a thread."""
    zero_init: bool
    """Whether the model is built inside `deepspeed.zero.Init`."""

    def walked_micro_steps(self) -> list[tuple[int, bool]]:
        """The micro-steps that differ, by number, and whether each is the last before the optimizer's step."""
        last = self.micro_steps - 1
        return [(number, number == last) for number in sorted({*range(min(last, SETTLED)), last})]

    def widths(self) -> dict[Key, int]:
        """Bytes of an element of every parameter when it is gathered: in its own dtype, or autocast's."""
        own = self.precision.parameter
        return _widths(self.anatomy, (self.precision.autocast or own, own))

    def program(self) -> Program:
        """A micro-step of the model."""
        if self.anatomy.signature is not None:
            return recorded(self.anatomy.signature, self.block)
        is_third = isinstance(self.how, GatherSettings)
        return program(self.run, self.precision, is_third, self.memory_efficient_linear or not is_third, self.block)


@dataclass(frozen=True, eq=False)
class Walked:
    """A walk: levels and peaks up to the end of backward, where the gradients are, and what was given to collectives.

    `launched`: of every micro-step, with how many are like it.
    """

    plan: WalkPlan
    meter: Meter
    program: Program
    gradients: Gradients | Gathers
    launched: Sequence[tuple[int, Launched]]

    @property
    def numels(self) -> Mapping[Key, int]:
        """The elements of every parameter."""
        return self.plan.anatomy.numels

    @functools.cached_property
    def widths(self) -> Mapping[Key, int]:
        """Bytes of an element of every parameter when it is gathered."""
        return self.plan.widths()

    @functools.cached_property
    def wires(self) -> Mapping[Key, int]:
        """Bytes of an element of every gradient when it is reduced."""
        return _widths(self.plan.anatomy, self.plan.wires)

    @functools.cached_property
    def reduced(self) -> Sequence[tuple[int, tuple[Key, ...]]]:
        """The gradients that are reduced together, and how often in a step."""
        return [(times, keys) for times, launched in self.launched for keys in launched.reduced]


def walked(job: Job, engine: Engine) -> Walked:
    """The forward and backward passes of a step of a job whose model's passes are known."""
    return _walked(_plan(job, engine))


def passes(job: Job, engine: Engine, done: Walked) -> Meter:
    """Levels and peaks of a whole step above what is allocated before it."""
    gradients: Gradients | Gathers | Share = done.gradients
    meter = done.meter
    if isinstance(gradients, PartitionedGradients):
        how, gradients = gradients.how, share(engine)
        meter = partitioned(meter, done.numels, how, gradients)
    meter = meter.copy()
    meter.resolve(engine.world_size)
    if isinstance(gradients, Gathers) and gradients.differs_at_first:
        first = _first_step(done.plan).copy()
        first.resolve(engine.world_size)
        raise_to_first_step(engine, meter, first)
    meter.ends[Phase.BACKWARD] += waiting_norms(engine, gradients, meter.block)
    step(engine, meter, gradients)
    return meter


@functools.lru_cache(maxsize=REMEMBERED)
def _like(anatomy: Anatomy, world_size: int) -> int:
    """A number of ranks for which ZeRO-3 gathers and reduces the same bytes, but for `NEGLIGIBLE` padding: 2 if possible.

    Parameters are gathered whole; what differs is the padding, and whether a single gradient can be reduced in place.
    """
    if world_size <= 2:
        return world_size
    numels = list(anatomy.numels.values())
    padding = sum(padding_bytes(n, world_size, dtype_bytes("fp32"), ALLOCATOR_BLOCK_BYTES) for n in numels)
    alike = all((n % world_size == 0) == (n % 2 == 0) for n in set(numels))
    return 2 if alike and padding <= NEGLIGIBLE else world_size


def _plan(job: Job, engine: Engine) -> WalkPlan:
    facts, workload = engine.facts, job.profile.workload
    width, half = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.autocast_dtype)
    outputs, loss, _ = kept_by_the_loop(job, engine)
    is_mixed = half and facts.wrapper in (Wrapper.ZERO12, Wrapper.ZERO3)
    return WalkPlan(
        anatomy=engine.anatomy,
        run=run_of(job, facts),
        precision=Precision(width, half, "fp16" in {facts.parameter_dtype, facts.autocast_dtype}, job.device is Device.GPU),
        block=block_bytes(job),
        micro_steps=workload.gradient_accumulation_steps,
        outputs=tuple((each.label, each.bytes) for each in outputs),
        loss=loss.bytes,
        wires=(half, width) if is_mixed else (dtype_bytes(facts.communication_dtype),) * 2,
        casts_to_reduce=facts.communication_dtype != facts.gradient_dtype,
        how=_how(job, engine),
        memory_efficient_linear=engine.zero.memory_efficient_linear,
        workspace=cublas_workspace_bytes(job.gpu) if job.gpu else 0,
        zero_init=job.is_inside_zero_init,
    )


def _how(job: Job, engine: Engine) -> GatherSettings | GradientReduction | Accumulation | None:
    facts, zero = engine.facts, engine.zero
    width, master, offloads = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.master_dtype), offloads_optimizer(engine.config)
    if facts.wrapper is Wrapper.ZERO12:
        overlap, is_second = overlaps_communication(engine.config), job.case.zero_stage == 2
        return GradientReduction(
            bucket_size=zero.reduce_bucket_size,
            buffers=1 + overlap,
            contiguous=zero.contiguous_gradients,
            width=width,
            early=is_second or overlap,
            always=is_second,
            master=master if offloads else 0,
            scatters=zero.reduce_scatter,
        )
    if facts.wrapper is Wrapper.BF16:
        return Accumulation(dtype_bytes(facts.communication_dtype), bool(engine.config["bf16"].get("immediate_grad_update")))
    if facts.wrapper is not Wrapper.ZERO3:
        return None
    return GatherSettings(
        world_size=_like(engine.anatomy, engine.world_size),
        prefetch_bucket=zero.prefetch_bucket_size,
        max_live=zero.max_live_parameters,
        max_reuse_distance=zero.max_reuse_distance,
        reduce_bucket=zero.reduce_bucket_size,
        contiguous=zero.contiguous_gradients,
        width=width,
        gradient=dtype_bytes(facts.gradient_dtype),
        persistent=frozenset(engine.anatomy.keys[place] for place in persistent_places(engine.all_numels, zero)),
        on_host=offloads_parameters(engine.config),
        offloads=offloads,
        scatters=zero.reduce_scatter,
        copies=job.device is Device.CPU and engine.world_size > 1,
    )


@functools.lru_cache(maxsize=REMEMBERED)
def _walked(plan: WalkPlan) -> Walked:
    whole = plan.program()
    if (known := coordinated(plan, whole, is_first=False)) is not None:
        return _played(plan, whole, known)
    meter = Meter(plan.block)
    gradients, handlers = strategy(plan, meter, whole)
    last = plan.micro_steps - 1
    launched = []
    for number, is_last in plan.walked_micro_steps():
        gradients.start(is_boundary=is_last)
        walk(whole, meter, handlers)
        gradients.finish()
        close(whole, meter)
        meter.begin(Phase.STEP)
        launched.append((last - number if number == SETTLED - 1 < last else 1, gradients.launched))
    return Walked(plan, meter, whole, gradients, launched)


@dataclass(frozen=True, eq=False)
class Coordinated:
    """What ZeRO-3 does in the micro-steps of a plan (`written.py`), which of the events concern it, and what it does at the end."""

    gathers: Gathers
    kinds: frozenset[str]
    steps: Sequence[WrittenMicroStep]
    end: Action


def _played(plan: WalkPlan, whole: Program, known: Coordinated) -> Walked:
    """The same walk, of what the coordinator does known."""
    meter, last = Meter(plan.block), plan.micro_steps - 1
    player, others = Player(whole, meter, known.kinds), loop(meter, plan)
    launched = []
    for (number, _), written in zip(plan.walked_micro_steps(), known.steps, strict=True):
        player.play(written, others)
        close(whole, meter)
        meter.begin(Phase.STEP)
        launched.append((last - number if number == SETTLED - 1 < last else 1, written.launched))
    player.end(known.end)
    return Walked(plan, meter, whole, known.gathers, launched)


_COORDINATED: dict[Hashable, Coordinated] = {}
"""By everything that the coordinator depends on, which is not what activations weigh."""


def coordinated(plan: WalkPlan, whole: Program, *, is_first: bool) -> Coordinated | None:
    """What ZeRO-3 does in the micro-steps of a plan, those of a job's first step or later ones; `None` below stage 3."""
    if not isinstance(plan.how, GatherSettings):
        return None
    widths = plan.precision.autocast or plan.precision.parameter, plan.precision.parameter
    own = (plan.anatomy.number, widths, plan.wires, plan.how, plan.zero_init, plan.block, plan.micro_steps, is_first)
    key = (*own, whole.of_the_engine)
    if key not in _COORDINATED:
        if len(_COORDINATED) >= REMEMBERED:
            _COORDINATED.clear()
        _COORDINATED[key] = _coordinate(plan, whole, is_first=is_first)
    return _COORDINATED[key]


def _coordinate(plan: WalkPlan, whole: Program, *, is_first: bool) -> Coordinated:
    writing = Writing(plan.block)
    gathers = _gradients(plan, writing.meter, whole)
    assert isinstance(gathers, Gathers), "other stages keep parameters whole"
    if is_first:
        gathers.forget()
    handlers = _handlers(gathers)
    steps = [writing.micro_step(whole, gathers, handlers, is_boundary=is_last) for _, is_last in plan.walked_micro_steps()]
    gathers.release_all()
    return Coordinated(gathers, frozenset(handlers), steps, writing.meter.cut())


def _widths(anatomy: Anatomy, sizes: tuple[int, int]) -> dict[Key, int]:
    """Bytes of an element of every parameter: of those that autocast casts, and of the others."""
    return {key: sizes[not p.cast_by_autocast] for key, p in zip(anatomy.keys, anatomy.parameters, strict=True)}


@functools.lru_cache(maxsize=REMEMBERED)
def _first_step(plan: WalkPlan) -> Meter:
    """The first micro-steps of a job at stage 3, in which nothing is prefetched, and no persistent parameter is there until it is used.

    DeepSpeed lets go of those again in the very first, while it records the order of modules, and gathers them with others in the next.
    The backward pass runs in a thread of its own, whose workspace comes with its first matrix product.
    """
    whole, meter = plan.program(), Meter(plan.block)
    for label, size in (*plan.outputs, (LOSS, plan.loss), (CUBLAS_WORKSPACES, plan.workspace)):
        meter.give(label, size)
    others: dict[str, Handler] = {"backward": lambda *_: meter.take(CUBLAS_WORKSPACES, plan.workspace)}
    known = coordinated(plan, whole, is_first=True)
    assert known is not None, "other stages keep parameters whole"
    player = Player(whole, meter, known.kinds)
    for written in known.steps[:2]:
        player.play(written, others)
        close(whole, meter)
        meter.begin(Phase.STEP)
        others = loop(meter, plan)
    return meter


def loop(meter: Meter, plan: WalkPlan) -> dict[str, Handler]:
    """What the training loop does when it gets outputs and a loss, of which it already has some."""
    kept = {"logits": plan.outputs, "loss": ((LOSS, plan.loss),)}
    return {kind: functools.partial(_replace, meter, held) for kind, held in kept.items()}


def _replace(meter: Meter, held: Sequence[tuple[Label, int]], *_: object) -> None:
    """The loop assigns new tensors to the variables that held the last micro-step's."""
    for label, size in held:
        meter.give(label, size)


def strategy(plan: WalkPlan, meter: Meter, whole: Program) -> tuple[Gradients, dict[str, Handler]]:
    """Below stage 3: who takes the gradients, and what the engine and the training loop do at the events of a micro-step."""
    gradients = _gradients(plan, meter, whole)
    assert isinstance(gradients, Gradients), "at stage 3 the coordinator is asked (`coordinated`)"
    return gradients, _handlers(gradients) | loop(meter, plan)


def _gradients(plan: WalkPlan, meter: Meter, whole: Program) -> Gradients | Gathers:
    anatomy, how = plan.anatomy, plan.how
    if how is None:
        return Gradients(meter, anatomy.trained, plan.wires[1] if plan.casts_to_reduce else 0)
    if isinstance(how, Accumulation):
        return AccumulatedGradients(meter, anatomy.trained, how)
    wires = _widths(anatomy, plan.wires)
    if isinstance(how, GradientReduction):
        meter.log = []
        return PartitionedGradients(meter, anatomy.trained, {key: wires[key] for key in anatomy.trained}, how)
    trace = list(whole.modules())
    order = _cut(anatomy) if plan.zero_init else anatomy.keys
    owned, leaves = _modules(plan, trace)
    return Gathers(
        meter, anatomy.numels, widths=plan.widths(), wires=wires, owned=owned, trace=trace, order=order, settings=how, leaves=leaves
    )


def _modules(plan: WalkPlan, trace: Sequence[Key]) -> tuple[dict[Key, list[Key]], Leaves | None]:
    """The parameters of each module that is called, and those that are taken as one with all that is in them."""
    anatomy = plan.anatomy
    if (signature := anatomy.signature) is not None:
        called = {anatomy.key(each.name): [anatomy.key(name) for name in each.parameters] for each in signature.modules}
        modules = {anatomy.key(each.name) for each in signature.modules if each.is_leaf}
        return called, Leaves(modules, trace, anatomy.numels) if modules else None
    tied = {key_of(TIED_HEAD): key_of(spec.name) for spec in anatomy.parameters if spec.tied}
    return owners(trace, anatomy.numels, tied), None


@functools.lru_cache(maxsize=REMEMBERED)
def _cut(anatomy: Anatomy) -> list[Key]:
    """The parameters in the order in which `deepspeed.zero.Init` cuts them."""
    modules = [each.name.rpartition(".")[0] for each in anatomy.parameters]
    return [anatomy.keys[index] for index in cut_order(modules) if index is not None]


def _handlers(gradients: Gradients | Gathers) -> dict[str, Handler]:
    if not isinstance(gradients, Gathers) or gradients.is_free:
        return {"gradient": gradients.ready}
    return {
        "gradient": gradients.ready,
        "fetch": gradients.fetch,
        "fetch backward": gradients.fetch_backward,
        "release": gradients.release,
        "release backward": gradients.release_backward,
        "pin": gradients.pin,
        "unpin": gradients.unpin,
    }


def share(engine: Engine) -> Share:
    """The flat buffer of stages 1 and 2, seen by the first rank."""
    zero, world, size = engine.zero, engine.world_size, dtype_bytes(engine.facts.parameter_dtype)
    return Share(_spans(engine.anatomy, world if zero.round_robin_gradients else 1, zero, size), engine.flat_numel // world)


@functools.lru_cache(maxsize=REMEMBERED)
def _spans(anatomy: Anatomy, ranks: int, zero: ZeroSettings, size: int) -> dict[Key, tuple[int, int]]:
    """Where every parameter is in the flat buffer, in its order there (`layout.flat_spans`)."""
    numels = anatomy.trained
    return dict(zip(dealt_out(list(numels), ranks), flat_spans(list(numels.values()), ranks, zero, size), strict=True))
