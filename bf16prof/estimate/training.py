"""The peaks of forward, backward and step of a job: its program, walked with the strategy of its ZeRO stage.

A walk does not depend on the number of ranks, but for what follows from padding at stage 3 and from the partition at stages 1 and 2; so
walks are remembered, and the rest is filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.engine.config import Wrapper, dtype_bytes, offloads_optimizer, overlaps_communication
from bf16prof.estimate.gathers import Gathers, Key, Settings, owners
from bf16prof.estimate.gradients import Gradients, PartitionedGradients, Reduction, Share, partitioned
from bf16prof.estimate.layout import flat_numel, flat_spans
from bf16prof.estimate.passes import Handler, Meter, close, walk
from bf16prof.estimate.program import Program, program, run_of
from bf16prof.estimate.steady import Engine
from bf16prof.estimate.step import step
from bf16prof.models.autograd.tape import Precision
from bf16prof.models.shapes import inventory
from bf16prof.models.tapes import Run
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.models import Model
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.records import Component, Device, Label, Phase

LOGITS: Label = (Component.ACTIVATIONS, "logits kept by the training loop")
LOSS: Label = (Component.ACTIVATIONS, "loss kept by the training loop")
REMEMBERED = 512
SETTLED = 2
"""Micro-steps after which those before the last repeat."""
NEGLIGIBLE = 2**16
"""Bytes of padding that do not tell one number of ranks from another."""


@dataclass(frozen=True)
class Plan:
    """Everything that a walk depends on. `how`: of stage 3, of stages 1 and 2, or `None`; `wires`: widths in communication."""

    run: Run
    precision: Precision
    block: int
    micro_steps: int
    kept: tuple[int, int]
    """Bytes of the logits and of the loss that the loop holds until it has new ones."""
    wires: tuple[int, int]
    """Bytes of an element in communication: of parameters that autocast casts, and of the others."""
    how: Settings | Reduction | None
    memory_efficient_linear: bool


@dataclass(frozen=True, eq=False)
class Walked:
    """A walk: levels and peaks up to the end of backward, and where the gradients are."""

    meter: Meter
    program: Program
    gradients: Gradients | Gathers


def block_bytes(job: Job) -> int:
    """What the allocator rounds to."""
    return ALLOCATOR_BLOCK_BYTES if job.device is Device.GPU else 1


def passes(job: Job, engine: Engine, kept: tuple[int, int]) -> tuple[Meter, Program]:
    """Levels and peaks of a whole step above what is allocated before it; `kept`: bytes of logits and loss that the loop holds."""
    walked = _walked(_plan(job, engine, kept))
    gradients: Gradients | Gathers | Share = walked.gradients
    meter = walked.meter
    if isinstance(gradients, PartitionedGradients):
        how, gradients = gradients.how, _share(job, engine)
        meter = partitioned(meter, _numels(job.profile.model), how, gradients)
    meter = meter.copy()
    step(engine, meter, gradients)
    return meter, walked.program


@functools.lru_cache(maxsize=REMEMBERED)
def _like(model: Model, world_size: int) -> int:
    """A number of ranks for which ZeRO-3 gathers and reduces the same bytes, but for `NEGLIGIBLE` padding: 2 if possible.

    Parameters are gathered whole; what differs is the padding, and whether a single gradient can be reduced in place.
    """
    if world_size <= 2:
        return world_size
    numels = [each.numel for each in inventory(model)]
    padding = sum(-n % world_size for n in numels)
    alike = all((n % world_size == 0) == (n % 2 == 0) for n in set(numels))
    return 2 if alike and padding * dtype_bytes("fp32") <= NEGLIGIBLE else world_size


@functools.cache
def _numels(model: Model) -> dict[Key, int]:
    return {key_of(each.name): each.numel for each in inventory(model)}


def key_of(name: str) -> Key:
    """`transformer.h.3.attn.c_attn.weight` as (3, `attn.c_attn.weight`), and what is outside the layers with -1."""
    parts = name.split(".")
    place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return (-1, name) if place is None else (int(parts[place]), ".".join(parts[place + 1 :]))


def _plan(job: Job, engine: Engine, kept: tuple[int, int]) -> Plan:
    facts, workload = engine.facts, job.profile.workload
    width, half = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.autocast_dtype)
    return Plan(
        run=run_of(job, facts),
        precision=Precision(width, half, "fp16" in {facts.parameter_dtype, facts.autocast_dtype}, job.device is Device.GPU),
        block=block_bytes(job),
        micro_steps=workload.gradient_accumulation_steps,
        kept=kept,
        wires=(half, width) if half else (dtype_bytes(facts.communication_dtype),) * 2,
        how=_how(job, engine),
        memory_efficient_linear=engine.zero.memory_efficient_linear,
    )


def _how(job: Job, engine: Engine) -> Settings | Reduction | None:
    facts, zero = engine.facts, engine.zero
    half = dtype_bytes(facts.autocast_dtype)
    width, master, offloads = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.master_dtype), offloads_optimizer(engine.config)
    if facts.wrapper is Wrapper.ZERO12:
        overlap, is_second = overlaps_communication(engine.config), job.case.zero_stage == 2
        early = is_second or overlap
        return Reduction(
            zero.reduce_bucket_size, 1 + overlap, zero.contiguous_gradients, width, early, is_second, master if offloads else 0
        )
    if facts.wrapper is not Wrapper.ZERO3:
        return None
    return Settings(
        world_size=engine.world_size
        if offloads or (facts.autocast_dtype != "none" and width > half)
        else _like(job.profile.model, engine.world_size),
        prefetch_bucket=zero.prefetch_bucket_size,
        max_live=zero.max_live_parameters,
        max_reuse_distance=zero.max_reuse_distance,
        reduce_bucket=zero.reduce_bucket_size,
        contiguous=zero.contiguous_gradients,
        width=width,
        gradient=dtype_bytes(facts.gradient_dtype),
        persistent=_persistent(engine, _numels(job.profile.model)),
        on_host=zero.offload_param.device != "none",
        offloads=offloads,
    )


def _persistent(engine: Engine, numels: Mapping[Key, int]) -> frozenset[Key]:
    """`layout.persistent`, as keys."""
    zero, total, kept = engine.zero, 0, []
    for key, n in numels.items():
        if n <= zero.param_persistence_threshold and n + total <= zero.model_persistence_threshold:
            kept.append(key)
            total += n
    return frozenset(kept)


@functools.lru_cache(maxsize=REMEMBERED)
def _walked(plan: Plan) -> Walked:
    is_third = isinstance(plan.how, Settings)
    whole = program(plan.run, plan.precision, is_third and plan.memory_efficient_linear, plan.block)
    meter = Meter(plan.block)
    gradients = _gradients(plan, meter, whole)
    handlers = _handlers(gradients)
    for kind, label, size in zip(("logits", "loss"), (LOGITS, LOSS), plan.kept, strict=True):
        handlers[kind] = functools.partial(_replace, meter, label, size)
    last = plan.micro_steps - 1
    for number in sorted({*range(min(last, SETTLED)), last}):
        gradients.start(is_boundary=number == last)
        walk(whole, meter, handlers)
        gradients.finish()
        close(whole, meter)
        meter.begin(Phase.STEP)
    if isinstance(gradients, Gathers):
        gradients.release_all()
    return Walked(meter, whole, gradients)


def _replace(meter: Meter, label: Label, size: int, *_: object) -> None:
    """The loop assigns the new tensor to the variable that held the last micro-step's."""
    meter.give(label, size)


def _gradients(plan: Plan, meter: Meter, whole: Program) -> Gradients | Gathers:
    numels, how = _numels(plan.run.model), plan.how
    if how is None:
        return Gradients(meter, numels)
    cast, other = plan.wires
    wires = {key: cast if p.cast_by_autocast else other for key, p in zip(numels, inventory(plan.run.model), strict=True)}
    if isinstance(how, Reduction):
        meter.log = []
        return PartitionedGradients(meter, numels, wires, how)
    trace = list(whole.modules())
    first = next(iter(numels))
    tied = {} if (-1, "lm_head.weight") in numels or (-1, "lm_head") not in trace else {(-1, "lm_head"): first}
    return Gathers(meter, numels, widths=wires, owned=owners(trace, numels, tied), trace=trace, settings=how)


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


def _share(job: Job, engine: Engine) -> Share:
    zero, size = engine.zero, dtype_bytes(engine.facts.parameter_dtype)
    total = flat_numel(engine.numels, engine.world_size, zero, size)
    return Share(_spans(job.profile.model, engine.world_size if zero.round_robin_gradients else 1, zero, size), total // engine.world_size)


@functools.lru_cache(maxsize=REMEMBERED)
def _spans(model: Model, ranks: int, zero: ZeroSettings, size: int) -> dict[Key, tuple[int, int]]:
    """Where every parameter is in the flat buffer, in its order there (`layout.flat_spans`)."""
    numels = _numels(model)
    keys = list(numels)
    order = [key for rank in range(ranks) for key in keys[rank::ranks]]
    return dict(zip(order, flat_spans(list(numels.values()), ranks, zero, size), strict=True))
