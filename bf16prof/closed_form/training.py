"""A training step of a job: its program, walked with the strategy of its optimizer wrapper; the
peaks of forward, backward and step.

A walk does not depend on the number of ranks, but for what follows from padding at stage 3 and from
the partition at stages 1 and 2; so walks are remembered, and the rest is filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.closed_form.between_steps import kept_by_the_loop
from bf16prof.closed_form.engine import FP64_BYTES, Engine, block_bytes
from bf16prof.closed_form.first_step import raise_to_first_step
from bf16prof.closed_form.gathers import Gathers
from bf16prof.closed_form.passes import REMEMBERED, Handler, Meter, close, walk
from bf16prof.closed_form.program import Program, run_of
from bf16prof.closed_form.strategy import Strategy
from bf16prof.closed_form.walks import Walked, WalkPlan
from bf16prof.closed_form.wrappers import wrapper_of
from bf16prof.closed_form.wrappers.wrapper import OptimizerWrapper
from bf16prof.closed_form.written import Action, Player, Writing, WrittenMicroStep
from bf16prof.engine.config import dtype_bytes
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.engine.workspace import cublas_workspace_bytes
from bf16prof.models.autograd.events import LOSS
from bf16prof.models.autograd.tape import Precision
from bf16prof.rounding import round_up
from bf16prof.vocabulary import Device, Label, Phase


def walked(job: Job, engine: Engine) -> Walked:
    """The forward and backward passes of a step of a job whose model's passes are known."""
    return _walked(plan_of(job, engine))


def passes(engine: Engine, done: Walked) -> Meter:
    """Levels and peaks of a whole step above what is allocated before it."""
    wrapper = wrapper_of(engine)
    meter = wrapper.with_partition(done).copy()
    meter.resolve(engine.world_size)
    if done.gradients.differs_at_first:
        first = _first_step(done.plan).copy()
        first.resolve(engine.world_size)
        raise_to_first_step(engine, meter, first)
    meter.ends[Phase.BACKWARD] += wrapper.waiting_norms * round_up(FP64_BYTES, meter.block)
    step(wrapper, meter, done.gradients)
    return meter


def step(wrapper: OptimizerWrapper, meter: Meter, gradients: Strategy) -> None:
    """The step phase, after the last micro-step."""
    meter.begin(Phase.STEP)
    wrapper.step(meter, gradients)
    meter.ends[Phase.STEP] = meter.level


def plan_of(job: Job, engine: Engine) -> WalkPlan:
    """What the walk through a job's step depends on."""
    facts, workload, wrapper = engine.facts, job.profile.workload, wrapper_of(engine)
    itemsize, half = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.autocast_dtype)
    outputs, loss, _ = kept_by_the_loop(job, engine)
    is_mixed = half and wrapper.autocast_communication()
    return WalkPlan(
        anatomy=engine.anatomy,
        run=run_of(job, facts),
        precision=Precision(itemsize, half, "fp16" in {facts.parameter_dtype, facts.autocast_dtype}, job.device is Device.GPU),
        block=block_bytes(job),
        micro_steps=workload.gradient_accumulation_steps,
        outputs=tuple((each.label, each.bytes) for each in outputs),
        loss=loss.bytes,
        communication=(half, itemsize) if is_mixed else (wrapper.communication_bytes,) * 2,
        strategy_settings=wrapper.strategy_settings(job),
        memory_efficient_linear=engine.zero.memory_efficient_linear,
        workspace=cublas_workspace_bytes(job.gpu) if job.gpu else 0,
        zero_init=job.is_inside_zero_init,
    )


@functools.lru_cache(maxsize=REMEMBERED)
def _walked(plan: WalkPlan) -> Walked:
    whole = plan.program()
    if (known := coordinated(plan, whole, is_first=False)) is not None:
        return _played(plan, whole, known)
    meter = Meter(plan.block)
    gradients = plan.strategy_settings.strategy(plan, meter, whole)
    handlers = gradients.handlers() | loop(meter, plan)
    launched = []
    for number, is_last in plan.walked_micro_steps():
        gradients.start(is_boundary=is_last)
        walk(whole, meter, handlers)
        gradients.finish()
        close(whole, meter)
        meter.begin(Phase.STEP)
        launched.append((plan.repetitions(number), gradients.launched))
    return Walked(plan, meter, whole, gradients, launched)


@dataclass(frozen=True, eq=False)
class Coordinated:
    """What ZeRO-3 does in the micro-steps of a plan (`written.py`), which of the events concern it,
    and what it does at the end."""

    gathers: Gathers
    kinds: frozenset[str]
    steps: Sequence[WrittenMicroStep]
    end: Action


def _played(plan: WalkPlan, whole: Program, known: Coordinated) -> Walked:
    """The same walk, of what the coordinator does known."""
    meter = Meter(plan.block)
    player, others = Player(whole, meter, known.kinds), loop(meter, plan)
    launched = []
    for (number, _), written in zip(plan.walked_micro_steps(), known.steps, strict=True):
        player.play(written, others)
        close(whole, meter)
        meter.begin(Phase.STEP)
        launched.append((plan.repetitions(number), written.launched))
    player.end(known.end)
    return Walked(plan, meter, whole, known.gathers, launched)


_COORDINATED: dict[Hashable, Coordinated] = {}
"""By everything that the coordinator depends on, which is not what activations weigh."""


def coordinated(plan: WalkPlan, whole: Program, *, is_first: bool) -> Coordinated | None:
    """What ZeRO-3 does in the micro-steps of a plan, those of a job's first step or later ones;
    `None` below stage 3."""
    if not plan.strategy_settings.is_partitioned:
        return None
    sizes = plan.gathered_itemsizes, plan.communication
    key = (plan.anatomy.number, *sizes, plan.strategy_settings, plan.zero_init, plan.block, plan.micro_steps, is_first, whole.of_the_engine)
    if key not in _COORDINATED:
        if len(_COORDINATED) >= REMEMBERED:
            _COORDINATED.clear()
        _COORDINATED[key] = _coordinate(plan, whole, is_first=is_first)
    return _COORDINATED[key]


def _coordinate(plan: WalkPlan, whole: Program, *, is_first: bool) -> Coordinated:
    writing = Writing(plan.block)
    gathers = plan.strategy_settings.strategy(plan, writing.meter, whole)
    assert isinstance(gathers, Gathers), "other strategies keep parameters whole"
    if is_first:
        gathers.forget()
    handlers = gathers.handlers()
    steps = [writing.micro_step(whole, gathers, handlers, is_boundary=is_last) for _, is_last in plan.walked_micro_steps()]
    gathers.release_all()
    return Coordinated(gathers, frozenset(handlers), steps, writing.meter.cut())


@functools.lru_cache(maxsize=REMEMBERED)
def _first_step(plan: WalkPlan) -> Meter:
    """The first micro-steps of a job at stage 3, in which nothing is prefetched, and no persistent
    parameter is there until it is used.

    DeepSpeed lets go of those again in the very first, while it records the order of modules, and
    gathers them with others in the next. The backward pass runs in a thread of its own, whose
    workspace comes with its first matrix product.
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
