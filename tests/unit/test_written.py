"""ZeRO-3's coordinator, written down once and played with other activations: the same as a walk with the coordinator at work."""

from __future__ import annotations

import random
from typing import Any

import jobs
import pytest

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form import training
from bf16prof.closed_form.passes import Meter, Peak
from bf16prof.closed_form.steady import Engine
from bf16prof.closed_form.training import WalkPlan
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import Device, Offload

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
    return training._plan(job, Engine.of(job))


def held(labels: dict[Any, int]) -> dict[Any, int]:
    return {label: size for label, size in labels.items() if size}


def seen(peak: Peak) -> tuple[object, ...]:
    return peak.level, peak.section, peak.events, held(peak.held), [(*each[:3], seen(each[3])) for each in peak.shared]


def known(meter: Meter) -> tuple[object, ...]:
    return meter.level, meter.ends, {phase: seen(peak) for phase, peak in meter.peaks.items()}, held(meter.held)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_played_is_what_is_walked(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = draw(random.Random(seed))
    monkeypatch.setattr(training, "_COORDINATED", {})
    walked, first = training._walked.__wrapped__(plan), training._first_step.__wrapped__(plan)
    assert set(training._COORDINATED.values()) == {None}, "nothing is written down for one walk"

    played, first_played = training._walked.__wrapped__(plan), training._first_step.__wrapped__(plan)

    assert None not in training._COORDINATED.values()
    assert known(played.meter) == known(walked.meter)
    assert known(first_played) == known(first)
    assert [(times, each.gathered, each.reduced) for times, each in played.launched] == [
        (times, each.gathered, each.reduced) for times, each in walked.launched
    ]


def test_another_length_asks_the_coordinator_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_COORDINATED", {})
    for length in (16, 32, 48):
        job = jobs.job(jobs.profile("cpu-demo", workload__sequence_length=length), 3)
        training._walked.__wrapped__(training._plan(job, Engine.of(job)))

    assert len(training._COORDINATED) == 1
