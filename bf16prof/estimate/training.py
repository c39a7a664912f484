"""A training step of a job: its program, walked with the strategy of its ZeRO stage; the peaks of forward, backward and step.

A walk does not depend on the number of ranks, but for what follows from padding at stage 3 and from the partition at stages 1 and 2; so
walks are remembered, and the rest is filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.engine.config import Wrapper, dtype_bytes, offloads_optimizer, offloads_parameters, overlaps_communication
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.engine.workspace import cublas_workspace_bytes
from bf16prof.estimate.first_step import raise_to_first_step
from bf16prof.estimate.gathers import Gathers, Settings, owners, padding_bytes
from bf16prof.estimate.gradients import (
    AccumulatedGradients,
    Accumulation,
    Gradients,
    Key,
    Launched,
    PartitionedGradients,
    Reduction,
    Share,
    partitioned,
)
from bf16prof.estimate.kept import kept_by_the_loop
from bf16prof.estimate.layout import cut_order, dealt_out, flat_spans, persistent_places
from bf16prof.estimate.leaves import Leaves
from bf16prof.estimate.passes import REMEMBERED, Handler, Meter, close, walk
from bf16prof.estimate.program import Program, key_of, program, run_of
from bf16prof.estimate.steady import Engine
from bf16prof.estimate.step import step, waiting_norms
from bf16prof.models.autograd.tape import LOGITS, LOSS, Precision
from bf16prof.models.shapes import TIED_HEAD, inventory
from bf16prof.models.tapes import Run, network
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.models import Model
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.records import Device, Label, Phase

SETTLED = 2
"""Micro-steps after which those before the last repeat."""
NEGLIGIBLE = 2**16
"""Bytes of padding that do not tell one number of ranks from another."""


@dataclass(frozen=True)
class Plan:
    """Everything that a walk depends on. `how`: of stage 3, of stages 1 and 2, of BF16_Optimizer, or `None` at stage 0."""

    run: Run
    precision: Precision
    block: int
    micro_steps: int
    kept: tuple[int, int]
    """Bytes of the logits and of the loss that the loop holds until it has new ones; 0 for logits that it does not keep."""
    wires: tuple[int, int]
    """Bytes of an element of a gradient when it is reduced: of parameters that autocast casts, and of the others."""
    casts_to_reduce: bool
    """Whether gradients are reduced in another dtype than their own."""
    how: Settings | Reduction | Accumulation | None
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
        return _widths(self.run.model, (self.precision.autocast or own, own))


@dataclass(frozen=True, eq=False)
class Walked:
    """A walk: levels and peaks up to the end of backward, where the gradients are, and what was given to collectives.

    `launched`: of every micro-step, with how many are like it.
    """

    plan: Plan
    meter: Meter
    program: Program
    gradients: Gradients | Gathers
    launched: Sequence[tuple[int, Launched]]

    @property
    def numels(self) -> Mapping[Key, int]:
        """The elements of every parameter."""
        return numels_of(self.plan.run.model)

    @functools.cached_property
    def widths(self) -> Mapping[Key, int]:
        """Bytes of an element of every parameter when it is gathered."""
        return self.plan.widths()

    @functools.cached_property
    def wires(self) -> Mapping[Key, int]:
        """Bytes of an element of every gradient when it is reduced."""
        return _widths(self.plan.run.model, self.plan.wires)

    @functools.cached_property
    def reduced(self) -> Sequence[tuple[int, tuple[Key, ...]]]:
        """The gradients that are reduced together, and how often in a step."""
        return [(times, keys) for times, launched in self.launched for keys in launched.reduced]


def block_bytes(job: Job) -> int:
    """What the allocator rounds to."""
    return ALLOCATOR_BLOCK_BYTES if job.device is Device.GPU else 1


def walked(job: Job, engine: Engine) -> Walked:
    """The forward and backward passes of a step of a job whose model has a tape."""
    return _walked(_plan(job, engine))


def passes(job: Job, engine: Engine, done: Walked) -> Meter:
    """Levels and peaks of a whole step above what is allocated before it."""
    gradients: Gradients | Gathers | Share = done.gradients
    meter = done.meter
    if isinstance(gradients, PartitionedGradients):
        how, gradients = gradients.how, share(job, engine)
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
def _like(model: Model, world_size: int) -> int:
    """A number of ranks for which ZeRO-3 gathers and reduces the same bytes, but for `NEGLIGIBLE` padding: 2 if possible.

    Parameters are gathered whole; what differs is the padding, and whether a single gradient can be reduced in place.
    """
    if world_size <= 2:
        return world_size
    numels = [each.numel for each in inventory(model)]
    padding = sum(padding_bytes(n, world_size, dtype_bytes("fp32"), ALLOCATOR_BLOCK_BYTES) for n in numels)
    alike = all((n % world_size == 0) == (n % 2 == 0) for n in set(numels))
    return 2 if alike and padding <= NEGLIGIBLE else world_size


@functools.cache
def numels_of(model: Model) -> dict[Key, int]:
    """The elements of every parameter of a model."""
    return {key_of(each.name): each.numel for each in inventory(model)}


@functools.cache
def _keys(model: Model) -> list[Key]:
    return list(numels_of(model))


def _plan(job: Job, engine: Engine) -> Plan:
    facts, workload = engine.facts, job.profile.workload
    width, half = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.autocast_dtype)
    held = {a.label: a.bytes for a in kept_by_the_loop(job.profile, facts)}
    is_mixed = half and facts.wrapper in (Wrapper.ZERO12, Wrapper.ZERO3)
    return Plan(
        run=run_of(job, facts),
        precision=Precision(width, half, "fp16" in {facts.parameter_dtype, facts.autocast_dtype}, job.device is Device.GPU),
        block=block_bytes(job),
        micro_steps=workload.gradient_accumulation_steps,
        kept=(held.get(LOGITS, 0), held[LOSS]),
        wires=(half, width) if is_mixed else (dtype_bytes(facts.communication_dtype),) * 2,
        casts_to_reduce=facts.communication_dtype != facts.gradient_dtype,
        how=_how(job, engine),
        memory_efficient_linear=engine.zero.memory_efficient_linear,
        workspace=cublas_workspace_bytes(job.gpu) if job.gpu else 0,
        zero_init=job.is_inside_zero_init,
    )


def _how(job: Job, engine: Engine) -> Settings | Reduction | Accumulation | None:
    facts, zero = engine.facts, engine.zero
    width, master, offloads = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.master_dtype), offloads_optimizer(engine.config)
    if facts.wrapper is Wrapper.ZERO12:
        overlap, is_second = overlaps_communication(engine.config), job.case.zero_stage == 2
        return Reduction(
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
    return Settings(
        world_size=_like(job.profile.model, engine.world_size),
        prefetch_bucket=zero.prefetch_bucket_size,
        max_live=zero.max_live_parameters,
        max_reuse_distance=zero.max_reuse_distance,
        reduce_bucket=zero.reduce_bucket_size,
        contiguous=zero.contiguous_gradients,
        width=width,
        gradient=dtype_bytes(facts.gradient_dtype),
        persistent=frozenset(_keys(job.profile.model)[place] for place in persistent_places(engine.numels, zero)),
        on_host=offloads_parameters(engine.config),
        offloads=offloads,
        scatters=zero.reduce_scatter,
    )


@functools.lru_cache(maxsize=REMEMBERED)
def _walked(plan: Plan) -> Walked:
    is_third = isinstance(plan.how, Settings)
    whole = program(plan.run, plan.precision, is_third, plan.memory_efficient_linear or not is_third, plan.block)
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
    if isinstance(gradients, Gathers):
        gradients.release_all()
    return Walked(plan, meter, whole, gradients, launched)


def _widths(model: Model, sizes: tuple[int, int]) -> dict[Key, int]:
    """Bytes of an element of every parameter: of those that autocast casts, and of the others."""
    return {key: sizes[not p.cast_by_autocast] for key, p in zip(numels_of(model), inventory(model), strict=True)}


@functools.lru_cache(maxsize=REMEMBERED)
def _first_step(plan: Plan) -> Meter:
    """The first micro-steps of a job at stage 3, in which nothing is prefetched, and no persistent parameter is there until it is used.

    DeepSpeed lets go of those again in the very first, while it records the order of modules, and gathers them with others in the next.
    The backward pass runs in a thread of its own, whose workspace comes with its first matrix product.
    """
    whole = program(plan.run, plan.precision, True, plan.memory_efficient_linear, plan.block)
    meter = Meter(plan.block)
    gathers = _gradients(plan, meter, whole)
    assert isinstance(gathers, Gathers), "other stages keep parameters whole"
    gathers.forget()
    handlers = _handlers(gathers)
    missing = ((LOGITS, plan.kept[0]), (LOSS, plan.kept[1]), (CUBLAS_WORKSPACES, plan.workspace))
    for label, size in missing:
        meter.give(label, size)
    handlers["backward"] = lambda *_: meter.take(CUBLAS_WORKSPACES, plan.workspace)
    for number in range(min(plan.micro_steps, 2)):
        gathers.start(is_boundary=number == plan.micro_steps - 1)
        walk(whole, meter, handlers)
        gathers.finish()
        close(whole, meter)
        meter.begin(Phase.STEP)
        handlers = _handlers(gathers) | _loop(meter, plan.kept)
    return meter


def _loop(meter: Meter, kept: tuple[int, int]) -> dict[str, Handler]:
    """What the training loop does when it gets logits and a loss, of which it already has some."""
    return {
        kind: functools.partial(_replace, meter, label, size)
        for kind, label, size in zip(("logits", "loss"), (LOGITS, LOSS), kept, strict=True)
    }


def _replace(meter: Meter, label: Label, size: int, *_: object) -> None:
    """The loop assigns the new tensor to the variable that held the last micro-step's."""
    meter.give(label, size)


def strategy(plan: Plan, meter: Meter, whole: Program) -> tuple[Gradients | Gathers, dict[str, Handler]]:
    """What the engine and the training loop do at the events of a micro-step: who takes the gradients, and all handlers."""
    gradients = _gradients(plan, meter, whole)
    return gradients, _handlers(gradients) | _loop(meter, plan.kept)


def _gradients(plan: Plan, meter: Meter, whole: Program) -> Gradients | Gathers:
    model, how = plan.run.model, plan.how
    numels = numels_of(model)
    if how is None:
        return Gradients(meter, numels, plan.wires[1] if plan.casts_to_reduce else 0)
    if isinstance(how, Accumulation):
        return AccumulatedGradients(meter, numels, how)
    wires = _widths(model, plan.wires)
    if isinstance(how, Reduction):
        meter.log = []
        return PartitionedGradients(meter, numels, wires, how)
    trace = list(whole.modules())
    tied = {key_of(TIED_HEAD): key_of(spec.name) for spec in inventory(model) if spec.tied}
    order = _cut(model) if plan.zero_init else list(numels)
    owned = owners(trace, numels, tied)
    net = network(plan.run)
    modules = {module for module in owned if module[0] >= 0 and module[1] == net.leaf}
    leaves = Leaves(modules, trace, numels, net.root) if modules else None
    return Gathers(meter, numels, widths=plan.widths(), wires=wires, owned=owned, trace=trace, order=order, settings=how, leaves=leaves)


@functools.cache
def _cut(model: Model) -> list[Key]:
    """The parameters in the order in which `deepspeed.zero.Init` cuts them."""
    keys = _keys(model)
    modules = [each.name.rpartition(".")[0] for each in inventory(model)]
    return [keys[index] for index in cut_order(modules) if index is not None]


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


def share(job: Job, engine: Engine) -> Share:
    """The flat buffer of stages 1 and 2, seen by the first rank."""
    zero, world, size = engine.zero, engine.world_size, dtype_bytes(engine.facts.parameter_dtype)
    return Share(_spans(job.profile.model, world if zero.round_robin_gradients else 1, zero, size), engine.flat_numel // world)


@functools.lru_cache(maxsize=REMEMBERED)
def _spans(model: Model, ranks: int, zero: ZeroSettings, size: int) -> dict[Key, tuple[int, int]]:
    """Where every parameter is in the flat buffer, in its order there (`layout.flat_spans`)."""
    numels = numels_of(model)
    return dict(zip(dealt_out(list(numels), ranks), flat_spans(list(numels.values()), ranks, zero, size), strict=True))
