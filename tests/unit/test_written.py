"""ZeRO-3's coordinator, written down once and played with other activations: the same as a walk
with the coordinator at work."""

from __future__ import annotations

import random
from typing import Any

import jobs
import pytest

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form import training
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.gathers import Gathers
from bf16prof.closed_form.passes import Handler, Meter, Peak, close, walk
from bf16prof.closed_form.requests import Requests
from bf16prof.closed_form.strategy import Launched
from bf16prof.closed_form.walks import WalkPlan
from bf16prof.closed_form.written import Retelling
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.models.autograd.events import LOSS
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.vocabulary import Device, Offload, Phase

RECIPES = ("bf16-full", "bf16-fp32-master", "fp32", "autocast-fp32", "bf16-full-autocast")
ZERO: dict[str, tuple[object, ...]] = {
    "reduce_bucket_size": (1000, 100_000, 500_000_000), "stage3_prefetch_bucket_size": (0, 1000, 50_000_000),
    "stage3_param_persistence_threshold": (0, 1000, 100_000), "stage3_max_live_parameters": (10_000, 10**9),
    "stage3_max_reuse_distance": (0, 10_000, 10**9), "contiguous_gradients": (True, False),
}  # fmt: skip
FLAG = (True, False)


def draw(rng: random.Random) -> WalkPlan:
    sets: dict[str, Any] = {
        f"deepspeed__zero_optimization__{key}": rng.choice(values) for key, values in ZERO.items() if rng.random() < 0.6
    }
    sets |= {
        "workload__micro_batch_size": rng.choice((1, 2, 4)), "workload__sequence_length": rng.choice((16, 100)),
        "workload__gradient_accumulation_steps": rng.choice((1, 1, 2, 4)), "workload__activation_checkpointing": rng.choice(FLAG),
        "workload__keeps_outputs": rng.choice(FLAG), "workload__zero_init": rng.choice(FLAG),
        "model__family": rng.choice(("llama", "gpt2", "transformer-postln")),
    }  # fmt: skip
    offload = rng.choice((Offload.NONE, Offload.NONE, Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS))
    case = ([3], [rng.choice((1, 2, 24))], [rng.choice(RECIPES)], Device.GPU, find_gpu("h100-80gb"), offload)
    job: Job = expand(Selection(jobs.profile("cpu-demo", **sets), *case))[0]
    return training.plan_of(job, Engine.of(job))


def held(labels: dict[Any, int]) -> dict[Any, int]:
    return {label: size for label, size in labels.items() if size}


def seen(peak: Peak) -> tuple[object, ...]:
    return peak.level, peak.section, peak.events, held(peak.held), [(*each[:3], seen(each[3])) for each in peak.shared]


def known(meter: Meter) -> tuple[object, ...]:
    return meter.level, meter.ends, {phase: seen(peak) for phase, peak in meter.peaks.items()}, held(meter.held)


def at_work(plan: WalkPlan, meter: Meter) -> Gathers:
    """The coordinator itself, on a meter."""
    gathers = plan.strategy_settings.strategy(plan, meter, plan.program())
    assert isinstance(gathers, Gathers)
    return gathers


def walked_at_work(plan: WalkPlan) -> tuple[Meter, list[Launched]]:
    whole, meter = plan.program(), Meter(plan.block)
    gathers, launched = at_work(plan, meter), []
    for _, is_last in plan.walked_micro_steps():
        gathers.start(is_boundary=is_last)
        walk(whole, meter, gathers.handlers() | training.loop(meter, plan))
        gathers.finish()
        close(whole, meter)
        meter.begin(Phase.STEP)
        launched.append(gathers.launched)
    gathers.release_all()
    return meter, launched


def first_step_at_work(plan: WalkPlan) -> Meter:
    whole, meter = plan.program(), Meter(plan.block)
    for label, size in (*plan.outputs, (LOSS, plan.loss), (CUBLAS_WORKSPACES, plan.workspace)):
        meter.give(label, size)
    others: dict[str, Handler] = {"backward": lambda *_: meter.take(CUBLAS_WORKSPACES, plan.workspace)}
    gathers = at_work(plan, meter)
    gathers.forget()
    for number in range(min(plan.micro_steps, 2)):
        gathers.start(is_boundary=number == plan.micro_steps - 1)
        walk(whole, meter, gathers.handlers() | others)
        gathers.finish()
        close(whole, meter)
        meter.begin(Phase.STEP)
        others = training.loop(meter, plan)
    return meter


@pytest.mark.parametrize("seed", range(12))
def test_what_is_played_is_what_is_walked(seed: int) -> None:
    # GIVEN a drawn plan; WHEN it is walked with the coordinator at work, and with what was written
    # of it
    plan = draw(random.Random(seed))
    meter, launched = walked_at_work(plan)
    played, first_played = training._walked.__wrapped__(plan), training._first_step.__wrapped__(plan)

    # THEN every level, every peak and what goes to collectives are the same
    assert known(played.meter) == known(meter)
    assert known(first_played) == known(first_step_at_work(plan))
    assert [(each.gathered, each.reduced) for _, each in played.launched] == [(each.gathered, each.reduced) for each in launched]
    assert sum(times for times, _ in played.launched) == plan.micro_steps, "a micro-step that is walked stands for those that are not"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_first", [True, False])
def test_what_is_retold_asks_the_allocator_for_the_same(seed: int, is_first: bool) -> None:
    # GIVEN a drawn plan, and what the coordinator at work asks the allocator for in its micro-steps
    plan = draw(random.Random(seed))
    whole, meter = plan.program(), Requests(plan.block, {}, 24)
    gathers = at_work(plan, meter)
    if is_first:
        gathers.forget()
    for _, is_last in plan.walked_micro_steps():
        gathers.start(is_boundary=is_last)
        walk(whole, meter, gathers.handlers())
        gathers.finish()
    gathers.release_all()

    # WHEN another meter is told what was written; THEN it asks for the same
    other, written = Requests(plan.block, {}, 24), training.coordinated(plan, whole, is_first=is_first)
    assert written is not None
    retelling = Retelling(written.steps, written.end, written.kinds, other)
    for _, is_last in plan.walked_micro_steps():
        retelling.start(is_boundary=is_last)
        walk(whole, other, retelling.handlers)
        retelling.finish()
    retelling.release_all()
    assert other.cut() == meter.cut()


def test_another_length_asks_the_coordinator_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_COORDINATED", {})
    for length in (16, 32, 48):
        job = jobs.job(jobs.profile("cpu-demo", workload__sequence_length=length), 3)
        training._walked.__wrapped__(training.plan_of(job, Engine.of(job)))

    assert len(training._COORDINATED) == 1


def test_another_point_of_a_general_signature_asks_the_coordinator_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_COORDINATED", {})
    for length in (1024, 2048):
        sets = {"workload.micro_batch_size": 2, "workload.sequence_length": length}
        profile = load_profile("olmo2-1b", [Override(key, value, "test") for key, value in sets.items()]).profile
        job = expand(Selection(profile, [3], [8], ["bf16-full"], Device.GPU, find_gpu("h100-80gb")))[0]
        training._walked.__wrapped__(training.plan_of(job, Engine.of(job)))

    assert len(training._COORDINATED) == 1
