"""Real DeepSpeed ranks hold, to the byte, what the estimate says; and what they are said to hold is
what their processes hold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from conftest import WARMUP, Measured
from harness import TINY, read_json

from bf16prof.models.modules import build
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.profiles.schema import Profile

pytestmark = pytest.mark.timeout(600)

SET = "--set"
OFFLOAD = ("--offload", "optimizer", SET, "optimizer.torch_adam=false")
LLAMA = ("model.family=llama", "model.hidden_size=72", "model.num_heads=6", "model.num_kv_heads=2", "model.tie_embeddings=true")
BF16, FULL = "bf16-fp32-master", "bf16-full"


def sets(*values: str) -> tuple[str, ...]:
    return tuple(word for value in values for word in (SET, value))


UNEVEN = ("--zero", "1,2,3", "--recipe", f"{BF16},{FULL}")
ACCUMULATING_GPT2 = (
    "--zero", "0", "--recipe", f"{BF16},fp32", "--gradient-accumulation-steps", "2",
    *sets("model.family=gpt2", "workload.keeps_outputs=false"),
)  # fmt: skip
CHECKPOINTED_LLAMA = ("--zero", "3", "--recipe", "autocast-fp32,bf16-full-autocast", "--activation-checkpointing", "--trace", *sets(*LLAMA))
FP32_ACCUMULATION = (
    "--zero", "1,2", "--recipe", BF16,
    *sets(
        "deepspeed.data_types.grad_accum_dtype=fp32",
        "deepspeed.zero_optimization.round_robin_gradients=true",
        "deepspeed.zero_optimization.parameter_alignment=true",
    ),
)  # fmt: skip
THREE_RANKS = (
    "--zero", "3", "--recipe", BF16, "--num-gpus", "3",
    *sets("deepspeed.zero_optimization.sub_group_size=20011", "deepspeed.zero_optimization.stage3_model_persistence_threshold=500"),
)  # fmt: skip
LOW_PRECISION_HOST = ("--zero", "3", "--recipe", "bf16-master", *OFFLOAD)
ACCUMULATING_HOST = ("--zero", "2", "--recipe", BF16, "--gradient-accumulation-steps", "2", *OFFLOAD)
HOST_PARAMETERS = ("--zero", "3", "--recipe", BF16, "--offload", "optimizer+parameters")
WITHOUT_MASTER = ("--zero", "0", "--recipe", "bf16-pure,bf16-kahan,bf16-fp32-states", "--quality", "2")
STOCHASTIC = ("--zero", "3", "--recipe", "bf16-stochastic-rounding", *sets("deepspeed.zero_optimization.sub_group_size=20011"))
EIGHT_BIT = ("--zero", "2", "--recipe", BF16, *sets("optimizer.library=adamw-8bit"))
FUSED_ADAM = ("--zero", "0,2", "--recipe", BF16, "--trace", *sets("optimizer.torch_adam=false"))

CASES = [
    *((UNEVEN, stage, recipe, wrapper) for stage, wrapper in (
        (1, "DeepSpeedZeroOptimizer"), (2, "DeepSpeedZeroOptimizer"), (3, "DeepSpeedZeroOptimizer_Stage3"),
    ) for recipe in (BF16, FULL)),
    (ACCUMULATING_GPT2, 0, BF16, "FP16_UnfusedOptimizer"),
    (ACCUMULATING_GPT2, 0, "fp32", "AdamW"),
    (CHECKPOINTED_LLAMA, 3, "autocast-fp32", "DeepSpeedZeroOptimizer_Stage3"),
    (CHECKPOINTED_LLAMA, 3, "bf16-full-autocast", "DeepSpeedZeroOptimizer_Stage3"),
    (FP32_ACCUMULATION, 1, BF16, "BF16_Optimizer"),
    (FP32_ACCUMULATION, 2, BF16, "DeepSpeedZeroOptimizer"),
    (THREE_RANKS, 3, BF16, "DeepSpeedZeroOptimizer_Stage3"),
    (LOW_PRECISION_HOST, 3, "bf16-master", "DeepSpeedZeroOptimizer_Stage3"),
    (ACCUMULATING_HOST, 2, BF16, "DeepSpeedZeroOptimizer"),
    (HOST_PARAMETERS, 3, BF16, "DeepSpeedZeroOptimizer_Stage3"),
    (FUSED_ADAM, 0, BF16, "FP16_Optimizer"),
    (FUSED_ADAM, 2, BF16, "DeepSpeedZeroOptimizer"),
    (WITHOUT_MASTER, 0, "bf16-pure", "AdamW"),
    (WITHOUT_MASTER, 0, "bf16-kahan", "AdamW"),
    (WITHOUT_MASTER, 0, "bf16-fp32-states", "AdamW32bit"),
    (STOCHASTIC, 3, "bf16-stochastic-rounding", "DeepSpeedZeroOptimizer_Stage3"),
    (EIGHT_BIT, 2, BF16, "DeepSpeedZeroOptimizer"),
]  # fmt: skip
NAMES = {
    UNEVEN: "uneven", ACCUMULATING_GPT2: "gpt2-accumulating", CHECKPOINTED_LLAMA: "llama-checkpointed",
    FP32_ACCUMULATION: "fp32-accumulation", THREE_RANKS: "three-ranks", LOW_PRECISION_HOST: "bf16-master-offloaded",
    ACCUMULATING_HOST: "offloaded-accumulating", HOST_PARAMETERS: "parameters-offloaded", FUSED_ADAM: "fused-adam",
    WITHOUT_MASTER: "without-master", STOCHASTIC: "stochastic", EIGHT_BIT: "eight-bit",
}  # fmt: skip
Measure = Callable[..., Measured]
Run = tuple[str, ...]

AT_NIGHT = (THREE_RANKS, LOW_PRECISION_HOST, STOCHASTIC, EIGHT_BIT)
"""What the dry run and the closed form are compared in too, by day."""


def by_day_or_night(run: Run, *rest: object) -> Any:
    """A parameter of a test that looks at that run."""
    id_ = "-".join([NAMES[run], *(f"zero{each}" if isinstance(each, int) else str(each) for each in rest[:2])])
    return pytest.param(run, *rest, id=id_, marks=[pytest.mark.nightly] if run in AT_NIGHT else [])


PARAMETERS = [by_day_or_night(*case) for case in CASES]


def profile(run: Run) -> Profile:
    """The profile that a run's words stand for."""
    values = [*TINY, *(value for word, value in pairwise(run) if word == SET)]
    return load_profile("cpu-demo", [parse_set(value) for value in values]).profile


@pytest.mark.parametrize(("run", "stage", "recipe", "wrapper"), PARAMETERS)
def test_every_byte_is_predicted_and_named(measured: Measure, run: Run, stage: int, recipe: str, wrapper: str) -> None:
    done = measured(*run)
    measurement, estimate = (done.finished.record(source, stage, recipe) for source in ("measure", "estimate"))

    assert measurement["components"].get("other", 0) == 0
    assert measurement["components"] == estimate["components"]
    assert measurement["allocated_bytes"] == estimate["allocated_bytes"] == sum(measurement["components"].values())
    assert measurement["allocated_bytes"] == max(rank["allocated_bytes"] for rank in measurement["ranks"])
    assert measurement["peak_allocated_bytes"] > measurement["allocated_bytes"]
    assert measurement["run_peak_allocated_bytes"] >= max(phase["peak_bytes"] for phase in measurement["phases"].values())


TRACED = [by_day_or_night(*case[:3]) for case in CASES if "--trace" in case[0]]


@pytest.mark.parametrize(("run", "stage", "recipe"), TRACED)
def test_the_peak_of_every_training_phase_is_predicted_from_a_recorded_pass(measured: Measure, run: Run, stage: int, recipe: str) -> None:
    done = measured(*run)
    measurement, estimate = (done.finished.record(source, stage, recipe) for source in ("measure", "estimate"))

    assert estimate["peak_phase"] == measurement["peak_phase"]
    # not init: its peak on real ranks differs by up to a percent from start to start
    for phase, found in measurement["phases"].items():
        if phase != "init":
            assert estimate["phases"][phase]["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.001), phase


@pytest.mark.parametrize(("run", "stage", "recipe", "wrapper"), PARAMETERS)
def test_the_allocator_counts_the_live_tensors_of_each_rank(measured: Measure, run: Run, stage: int, recipe: str, wrapper: str) -> None:
    done = measured(*run)
    measurement = done.finished.record("measure", stage, recipe)
    ranks = measurement["case"]["world_size"]
    (case,) = done.folder.glob(f"zero{stage}-w{ranks}-{recipe}*")
    witnesses = [read_json(case / f"witness{rank}.json") for rank in range(ranks)]

    assert [witness["live_bytes"] for witness in witnesses] == [rank["allocated_bytes"] for rank in measurement["ranks"]]
    assert {witness["wrapper"] for witness in witnesses} == {wrapper}


@pytest.mark.parametrize("run", [by_day_or_night(run) for run in NAMES])
def test_parameters_are_those_of_the_torch_module(measured: Measure, run: Run) -> None:
    module = build(profile(run).model, activation_checkpointing=False)
    expected = sum(parameter.numel() for parameter in module.parameters())

    assert {record["parameters"] for record in measured(*run).finished.document["records"]} == {expected}


@pytest.mark.parametrize("run", [UNEVEN], ids=[NAMES[UNEVEN]])
def test_steps_are_recorded_with_the_warm_up_marked(measured: Measure, run: Run) -> None:
    steps = measured(*run).finished.record("measure", 3, FULL)["steps"]

    assert [(step["step"], step["warmup"]) for step in steps] == [*((index, True) for index in range(WARMUP)), (WARMUP, False)]
    assert all(step["time_s"] > 0 and set(step["phases"]) == {"forward", "backward", "step"} for step in steps)


@pytest.mark.parametrize("run", [WITHOUT_MASTER], ids=[NAMES[WITHOUT_MASTER]])
def test_updates_are_watched_after_the_measured_steps(measured: Measure, run: Run) -> None:
    done = measured(*run)
    pure, kahan = (done.finished.record("measure", 0, recipe) for recipe in ("bf16-pure", "bf16-kahan"))

    for record in (pure, kahan):
        assert len(record["steps"]) == WARMUP + 1
        assert [step["step"] for step in record["quality"]] == [WARMUP + 1, WARMUP + 2]
        assert {step["total"]["elements"] for step in record["quality"]} == {2 * record["parameters"]}, "both ranks update all of them"
        assert {"layers.0", "layers.1", "layers.2"} < set(record["quality"][0]["layers"])
    for before, after in zip(pure["quality"], kahan["quality"], strict=True):
        assert before["total"]["edq"] < 0.99
        assert after["total"]["edq"] == pytest.approx(1, abs=0.01)
        assert 0 < after["total"]["lost_updates"] < before["total"]["lost_updates"] < 1
    rows = (done.folder / "quality.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "case,step,loss,layer,elements,lost_updates,edq"
    assert sum(row.startswith("zero0-w2-bf16-pure,") for row in rows) == sum(1 + len(step["layers"]) for step in pure["quality"])


@pytest.mark.parametrize("run", [ACCUMULATING_GPT2], ids=[NAMES[ACCUMULATING_GPT2]])
def test_accumulation_keeps_one_step_of_three_phases(measured: Measure, run: Run) -> None:
    steps = measured(*run).finished.record("measure", 0, "fp32")["steps"]

    assert len(steps) == WARMUP + 1
    assert all(set(step["phases"]) == {"forward", "backward", "step"} for step in steps)


@pytest.mark.parametrize("run", [CHECKPOINTED_LLAMA], ids=[NAMES[CHECKPOINTED_LLAMA]])
def test_checkpointing_keeps_fewer_activations(measured: Measure, run: Run) -> None:
    """The same llama without it: less is alive at the end of forward with it."""
    with_it = measured(*run).finished.record("measure", 3, "bf16-full-autocast")
    without = measured("--zero", "3", "--recipe", "bf16-full-autocast", *sets(*LLAMA)).finished.record("measure", 3, "bf16-full-autocast")

    assert with_it["phases"]["forward"]["end_bytes"] < without["phases"]["forward"]["end_bytes"]
    assert with_it["allocated_bytes"] == without["allocated_bytes"]
