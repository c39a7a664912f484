"""Planning: what the layout promises about the knobs, the order of plans, limits, advice, the
written JSON, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jobs
import pytest
from fake_ranks import DEEPSPEED_WARNINGS, build_engine, fake_ranks
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bf16prof.cases import Job
from bf16prof.closed_form.calibration import Calibration
from bf16prof.closed_form.least import least_bytes
from bf16prof.closed_form.predict import predict
from bf16prof.engine.config import deepspeed_config
from bf16prof.engine.constraints import refusal_reason
from bf16prof.errors import InputError, Refused
from bf16prof.models.shapes import inventory
from bf16prof.planning.advice import all_changes
from bf16prof.planning.answer import Answer, answer
from bf16prof.planning.judge import Judge, Judged
from bf16prof.planning.limits import _fewest
from bf16prof.planning.question import Question, Setting, powers_of_two
from bf16prof.planning.search import LEARNING, best_first, ranked
from bf16prof.planning.written import ds_config_text
from bf16prof.plans import EQUAL
from bf16prof.profiles.beside import beside_the_allocator
from bf16prof.profiles.gpus import Gpu, all_gpus, find_gpu
from bf16prof.profiles.recipes import all_recipes, runnable_recipes
from bf16prof.profiles.schema import Profile
from bf16prof.records import MemoryRecord
from bf16prof.reports import plan_html, plan_tables
from bf16prof.vocabulary import Device, Offload, Phase

pytestmark = DEEPSPEED_WARNINGS

RECIPES = tuple(runnable_recipes())
MODELS = [
    {"family": "transformer-postln", "hidden_size": 66, "num_heads": 6, "num_layers": 3, "vocab_size": 301, "max_sequence_length": 64},
    {"family": "gpt2", "hidden_size": 48, "num_heads": 4, "num_layers": 4, "vocab_size": 211, "max_sequence_length": 64},
    {
        "family": "llama", "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "vocab_size": 151,
        "max_sequence_length": 64,
    },
]  # fmt: skip
SETTINGS = settings(deadline=None, max_examples=40)

settings_ = st.builds(
    Setting,
    stage=st.integers(0, 3),
    world_size=st.integers(1, 40),
    recipe=st.sampled_from(RECIPES),
    offload=st.sampled_from(list(Offload)),
    micro_batch_size=st.integers(1, 9),
    checkpointing=st.booleans(),
    zero_init=st.just(False),
    sequence_length=st.integers(1, 64),
)
models = st.sampled_from(MODELS)


def small_gpu(memory_bytes: int) -> Gpu:
    return dataclasses.replace(find_gpu("a10-24gb"), id="small", memory_bytes=memory_bytes)


def question(memory_bytes: int = 24 << 30, settings: Profile | None = None, **changes: object) -> Question:
    asked = Question(settings or jobs.profile("gpt2-xl"), small_gpu(memory_bytes), (0, 1, 2, 3), RECIPES, powers_of_two(8))
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def predicted(model: dict[str, object], setting: Setting) -> MemoryRecord:
    job = a_job(model, setting)
    assume(refusal_reason(job) is None)
    return predict(job)


def a_job(model: dict[str, object], setting: Setting) -> Job:
    return question(settings=jobs.small_profile(dict(model))).job(setting)


# What DeepSpeed's layout promises, and the search relies on. It does not promise * that peaks fall
# with the number of GPUs: ZeRO-3 gathers the same parameters, keeps small ones whole from the
# second GPU on, and pads; * that ZeRO-3 needs less than ZeRO-2: its reduce bucket stays, and so do
# gathered parameters below stage3_max_live_parameters; * that checkpointing lowers the peak: a
# model of one layer has all its activations there again in backward. A test each shows that these
# do happen.


@given(models, settings_)
@SETTINGS
def test_more_gpus_never_need_more_between_steps_but_for_padding(model: dict[str, object], setting: Setting) -> None:
    assume(setting.stage > 0)
    few, many = (predicted(model, setting.but(world_size=setting.world_size * n)) for n in (1, 2))
    tensors = len(inventory(jobs.model_settings(**model)))
    persistent = sum(item.bytes for item in many.items if item.name == "persistent parameters")
    padding = (16 * 2 * setting.world_size + 512) * tensors

    assert few.allocated_bytes is not None
    assert many.allocated_bytes is not None
    assert many.allocated_bytes <= few.allocated_bytes + padding + persistent


@given(models, settings_, st.integers(1, 5))
@SETTINGS
def test_a_larger_micro_batch_never_needs_less(model: dict[str, object], setting: Setting, more: int) -> None:
    small = predicted(model, setting)
    large = predicted(model, setting.but(micro_batch_size=setting.micro_batch_size + more))

    assert (small.run_peak_allocated_bytes or 0) <= (large.run_peak_allocated_bytes or 0)


@given(models, settings_, st.integers(1, 9))
@SETTINGS
def test_a_longer_sequence_never_needs_less(model: dict[str, object], setting: Setting, more: int) -> None:
    assume(setting.sequence_length + more <= 64)
    short = predicted(model, setting)
    long = predicted(model, setting.but(sequence_length=setting.sequence_length + more))

    assert (short.run_peak_allocated_bytes or 0) <= (long.run_peak_allocated_bytes or 0)


@given(models, settings_)
@SETTINGS
def test_checkpointing_never_saves_more_activations_for_backward(model: dict[str, object], setting: Setting) -> None:
    kept, recomputed = (predicted(model, setting.but(checkpointing=on)) for on in (False, True))

    assert (recomputed.phases[Phase.FORWARD].end_bytes or 0) <= (kept.phases[Phase.FORWARD].end_bytes or 0)


@given(models, settings_)
@SETTINGS
def test_no_peak_is_below_what_is_told_without_one(model: dict[str, object], setting: Setting) -> None:
    record = predicted(model, setting)
    least = least_bytes(a_job(model, setting))

    assert least is not None
    assert (record.allocated_bytes or 0) <= least <= (record.run_peak_allocated_bytes or 0)


@given(models, settings_)
@SETTINGS
def test_a_larger_micro_batch_is_never_slower_in_the_floor(model: dict[str, object], setting: Setting) -> None:
    few, many = (predicted(model, setting.but(micro_batch_size=setting.micro_batch_size * n)).work for n in (1, 2))

    assert few is not None
    assert many is not None
    assert many.tokens / (many.step_time_floor_s or 0) >= few.tokens / (few.step_time_floor_s or 0) * (1 - 1e-12)


def test_more_gpus_may_need_a_higher_peak() -> None:
    small = jobs.small_profile(MODELS[1])
    few, many = (predict(jobs.job(small, 3, gpus, "bf16-full")).peak_allocated_bytes or 0 for gpus in (64, 512))

    assert many > few > 0


def test_zero3_may_need_more_than_zero2() -> None:
    small = jobs.profile("gpt2-xl", model__num_layers=12, workload__sequence_length=64)
    zero2, zero3 = (predict(jobs.job(small, stage, 2, "bf16-full")).peak_allocated_bytes or 0 for stage in (2, 3))

    assert zero3 > zero2 > 0


def test_checkpointing_may_leave_the_peak_where_it_is() -> None:
    kept = jobs.small_profile(MODELS[1] | {"num_layers": 1})
    recomputed = kept.model_copy(update={"workload": kept.workload.model_copy(update={"activation_checkpointing": True})})
    peaks = [predict(jobs.job(profile, 2, 2)).peak_allocated_bytes for profile in (kept, recomputed)]

    assert peaks[0] == peaks[1]


# The answer.


@pytest.fixture(scope="module")
def found() -> Answer:
    return answer(Judge(question(recipes=("bf16-fp32-master", "bf16-full"))), 2)


def test_every_plan_stays_within_the_room_and_the_margin_is_kept(found: Answer) -> None:
    outlook = found.outlook
    room = outlook.room

    assert outlook.plans
    assert outlook.complete
    assert room.bytes == ((24 << 30) - sum(item.bytes for item in beside_the_allocator(2, (8, 6)))) * 9 // 10
    for plan in outlook.plans:
        assert (plan.reserved_bytes or plan.peak_bytes) + plan.free_bytes == room.bytes
        assert plan.peak_bytes <= room.bytes
        assert plan.free_bytes >= 0
        assert plan.fits


def test_every_combination_that_fits_is_there_with_its_largest_micro_batch(found: Answer) -> None:
    asked = question(recipes=("bf16-fp32-master", "bf16-full"))
    judge = Judge(asked)
    expected = {}
    for setting in asked.combinations(2):
        fitting = [size for size in asked.sizes(2) if judge.fits(setting.but(micro_batch_size=size))]
        if fitting:
            expected[setting.stage, setting.recipe, setting.offload, setting.checkpointing] = max(fitting)

    assert expected == {
        (p.case.zero_stage, p.case.recipe, p.case.offload, p.activation_checkpointing): p.largest_micro_batch_size
        for p in found.outlook.plans
    }


def test_less_offloading_then_throughput_then_risk_in_learning(found: Answer) -> None:
    plans = found.outlook.plans

    order = [list(Offload).index(plan.case.offload) for plan in plans]
    assert order == sorted(order)
    for offload in Offload:
        alike = [plan for plan in plans if plan.case.offload is offload]
        best = max(plan.throughput for plan in alike)
        as_fast = [plan for plan in alike if plan.throughput > best / (1 + EQUAL)]
        assert alike[: len(as_fast)] == sorted(as_fast, key=lambda plan: (LEARNING.index(plan.learning), plan.case.zero_stage))


def test_of_the_micro_batches_the_smallest_of_the_fastest_is_taken() -> None:
    # GIVEN a job that computes so little that ZeRO-3's communication shows until the micro-batch is
    # large enough to hide it
    asked = question(80 << 30, jobs.profile("gpt2-xl", workload__sequence_length=128), stages=(3,), recipes=("bf16-full",))
    asked = dataclasses.replace(asked, micro_batches=powers_of_two(64), checkpointing=(False,), offloads=(Offload.NONE,))
    judge = Judge(asked)

    best = answer(judge, 8).outlook.plans[0]

    rates = {}
    for setting in asked.combinations(8):
        for size in asked.sizes(8):
            judged = judge(setting.but(micro_batch_size=size))
            assert judged is not None
            if judged.fits:
                rates[size] = judged.plan.throughput
    assert rates[1] < 0.9 * max(rates.values())
    assert best.micro_batch_size == min(size for size, rate in rates.items() if rate >= max(rates.values()) / 1.01)
    assert best.largest_micro_batch_size == max(rates)


def test_the_search_looks_no_further_than_asked(found: Answer) -> None:
    few = answer(Judge(question(recipes=("bf16-fp32-master", "bf16-full"))), 2, most=3).outlook

    assert few.plans == found.outlook.plans[:3]
    assert not few.complete


def test_every_class_of_learning_has_its_place() -> None:
    assert {recipe.learning for recipe in all_recipes().values()} == set(LEARNING)


def test_every_gpu_has_the_rates_that_bounds_need() -> None:
    for gpu in all_gpus().values():
        assert gpu.peak_flops("fp32"), gpu.id
        assert gpu.peak_flops("bf16"), gpu.id
        assert gpu.link_gb_per_s, gpu.id
        assert gpu.hbm_gb_per_s, gpu.id


def test_the_records_are_those_of_the_best_of_each_case(found: Answer) -> None:
    best = {plan.case: plan.peak_bytes for plan in reversed(found.outlook.plans)}

    assert {record.case: record.run_peak_allocated_bytes for record in found.records} == best


def test_beyond_the_limits_nothing_fits(found: Answer) -> None:
    first, limits = found.first, found.outlook.limits
    assert first is not None
    assert limits.micro_batch_size is not None
    assert limits.sequence_length is not None
    assert limits.same_gpus is not None
    fits, setting = Judge(question()).fits, first.setting

    assert fits(setting.but(micro_batch_size=limits.micro_batch_size))
    assert not fits(setting.but(micro_batch_size=limits.micro_batch_size + 1))
    assert fits(setting.but(sequence_length=limits.sequence_length))
    assert limits.longest or not fits(setting.but(sequence_length=limits.sequence_length + 64))
    assert fits(setting.but(world_size=limits.same_gpus))
    assert limits.same_gpus == 1 or not fits(setting.but(world_size=limits.same_gpus - 1))


@pytest.mark.parametrize("start", [1, 3, 8, 48, 300])
@pytest.mark.parametrize(("least", "expected"), [(1, 1), (5, 5), (7, 7), (9, 16), (33, 40), (500, 504), (2000, None)])
def test_the_fewest_gpus_are_found_from_wherever_the_search_begins(start: int, least: int, expected: int | None) -> None:
    found = _fewest(start, lambda n: n >= least)

    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert least <= found <= expected, "a number that is not of whole nodes may be met on the way"


def test_more_offloading_is_told_only_where_it_needs_fewer_gpus() -> None:
    fewest = answer(Judge(question(10 << 30, recipes=("bf16-fp32-master",))), 8, most=1).outlook.limits.fewest

    assert len(fewest) > 1
    for less, more in itertools.pairwise(fewest):
        assert list(Offload).index(more.case.offload) > list(Offload).index(less.case.offload)
        assert more.case.world_size < less.case.world_size


def test_where_nothing_fits_each_change_is_predicted_and_the_most_effective_comes_first() -> None:
    asked = question(8 << 30, recipes=("bf16-fp32-master",), offloads=(Offload.NONE,))

    outlook = answer(Judge(asked), 2).outlook

    assert outlook.plans == ()
    assert outlook.nearest is not None
    assert outlook.nearest.free_bytes < 0
    assert {change.flag for change in outlook.changes} >= {"--offload optimizer", "--recipe bf16-full"}
    order = [(not change.plan.fits, change.things) for change in outlook.changes]
    assert order == sorted(order)
    for change in outlook.changes:
        assert change.plan.peak_bytes == outlook.nearest.peak_bytes - change.saved_bytes
    assert [plan.case.world_size > 2 for plan in outlook.limits.fewest] == [True]
    assert outlook.limits.fewest[0].fits


def test_the_nearest_is_the_one_that_lacks_least() -> None:
    asked = question(6 << 30, offloads=(Offload.NONE,))
    judge = Judge(asked)

    nearest = answer(judge, 2).outlook.nearest

    assert nearest is not None
    assert nearest.peak_bytes == min(judged.plan.peak_bytes for setting in asked.combinations(2) if (judged := judge(setting)) is not None)


def test_no_change_is_told_that_saves_nothing() -> None:
    judge = Judge(question())
    start = judge(Setting(3, 4, "bf16-full", Offload.NONE, 2, True, False, 128))
    assert start is not None

    changes = all_changes(judge, start)

    assert changes
    assert all(change.saved_bytes > 0 for change in changes)


# Why ZeRO-3 needs more than ZeRO-2.


def test_zero3_against_zero2_names_the_bucket_and_the_gathered_parameters() -> None:
    # GIVEN a model under a billion parameters on few GPUs, of which ZeRO-3 keeps everything
    # gathered
    small = jobs.profile("gpt2-xl", model__num_layers=12, workload__sequence_length=64)

    comparison = answer(Judge(question(settings=small, recipes=("bf16-full",))), 2, most=1).outlook.stages

    assert comparison is not None
    assert comparison.more_bytes > 0
    assert comparison.more_bytes == sum(d.more_bytes for d in comparison.differences)
    more = {d.name: d.more_bytes for d in comparison.differences}
    assert more["gathered parameters"] > 0
    saved = {change.flag.rpartition(".")[2]: change.saved_bytes for change in comparison.changes}
    assert saved["reduce_bucket_size=50000000"] == pytest.approx(900e6, rel=1e-3)
    assert any(flag.startswith("stage3_max_") for flag in saved)


def test_a_key_changes_the_peak_by_what_is_told() -> None:
    small = jobs.profile("gpt2-xl", model__num_layers=12, workload__sequence_length=64)
    comparison = answer(Judge(question(settings=small, recipes=("bf16-full",))), 2, most=1).outlook.stages
    assert comparison is not None

    change = next(c for c in comparison.changes if c.flag.endswith("reduce_bucket_size=50000000"))
    with_it = jobs.profile(
        "gpt2-xl",
        model__num_layers=12,
        workload__sequence_length=64,
        workload__micro_batch_size=comparison.zero3.micro_batch_size,
        workload__activation_checkpointing=comparison.zero3.activation_checkpointing,
        deepspeed__zero_optimization__reduce_bucket_size=50_000_000,
    )
    record = predict(dataclasses.replace(jobs.job(with_it, 3, 2, "bf16-full"), gpu=small_gpu(24 << 30)))

    assert record.run_peak_allocated_bytes == comparison.zero3.peak_bytes - change.saved_bytes


@pytest.mark.parametrize(("recipe", "second"), [("fp32", True), ("autocast-fp32", True), ("bf16-fp32-master", False)])
def test_fp32_parameters_have_a_second_fp32_copy(recipe: str, second: bool) -> None:
    small = jobs.profile("gpt2-xl", model__num_layers=12, workload__sequence_length=64)

    comparison = answer(Judge(question(settings=small, recipes=(recipe,))), 1, most=1).outlook.stages

    assert comparison is not None
    assert (comparison.second_copy_bytes > 0) is second
    assert any(change.flag == "--recipe bf16-fp32-master" for change in comparison.changes) is second


# What is asked.


def test_the_batch_size_of_the_job_is_kept() -> None:
    found = answer(Judge(question(train_batch_size=24, recipes=("bf16-full",), stages=(2,))), 2)

    assert {plan.train_batch_size for plan in found.outlook.plans} == {24}
    assert {plan.largest_micro_batch_size for plan in found.outlook.plans} <= {1, 2, 4}


def test_what_cannot_be_planned_is_refused_with_the_reason() -> None:
    with pytest.raises(Refused, match="only under ZeRO stage 1, 2 or 3"):
        answer(Judge(question(stages=(0,), recipes=("bf16-full",))), 2)
    with pytest.raises(Refused, match="no closed form"):
        answer(Judge(question(settings=jobs.profile(optimizer__type="Adam", deepspeed__more={"optimizer": {"type": "Lion"}}))), 2)
    with pytest.raises(Refused, match=r"no peaks in closed form: zero_optimization.stage3_allgather_sequential"):
        answer(Judge(question(settings=jobs.profile("gpt2-xl", deepspeed__zero_optimization__allgather_sequential=True), stages=(3,))), 2)
    with pytest.raises(InputError, match="train_batch_size of 7"):
        answer(Judge(question(train_batch_size=7)), 2)


def test_order_does_not_depend_on_the_order_of_the_question(found: Answer) -> None:
    judge = Judge(question(recipes=("bf16-full", "bf16-fp32-master"), stages=(3, 2, 1, 0)))

    assert answer(judge, 2).outlook.plans == found.outlook.plans
    alike = [choice for choice in found.choices if choice.plan.case.offload is Offload.NONE]
    assert ranked(judge, alike[::-1]) == alike


def calibration(seconds_per: dict[str, float]) -> Calibration:
    return Calibration("runs/A", 1, seconds_per, 0.05, 0.0, Device.GPU, "small", frozenset({2}), 10**9)


def test_calibrated_plans_are_ranked_by_their_time() -> None:
    # GIVEN a machine that was measured in bf16, on which each collective takes so long that what
    # the floor says fastest is not
    asked = question(recipes=("bf16-full", "fp32"), offloads=(Offload.NONE, Offload.OPTIMIZER))
    seconds_per = {"operations bf16": 1 / 60e12, "optimizer bytes": 2e-12, "sent bytes": 1 / 25e9, "collectives": 5e-3}

    plans = answer(Judge(asked, calibration(seconds_per)), 2).outlook.plans

    told = [plan for plan in plans if plan.tokens_per_s is not None]
    assert {plan.case.recipe for plan in told} == {"bf16-full"}
    assert {plan.case.offload for plan in told} == {Offload.NONE}
    assert list(plans[: len(told)]) == told
    assert all((plan.tokens_per_s or 0) <= (plan.tokens_per_s_at_most or 0) for plan in told)
    assert answer(Judge(asked), 2).outlook.plans[0].case.zero_stage == 3
    assert told[0].case.zero_stage < 3
    assert (told[0].tokens_per_s or 0) * 1.05 > max(plan.tokens_per_s or 0 for plan in told)


def test_a_hostile_name_stays_a_name(found: Answer) -> None:
    assert found.first is not None
    name = "<script>alert(1)</script>\x1b[31m|"

    page = plan_html.render([plan_html.PlanPart(found.outlook, found.first.record)], {}, profile=name, parameters=1, asked="")
    table = plan_tables.to_markdown([found.outlook], name, 1, f"| {name}")

    for text in (page, table):
        assert "<script>alert" not in text
        assert "\x1b" not in text
    assert r"\|" in table.splitlines()[0]


# The DeepSpeed JSON.


def small_choices(world_size: int) -> list[Judged]:
    asked = question(settings=jobs.small_profile(), micro_batches=(2,), checkpointing=(False,))
    return list(best_first(Judge(asked), world_size))


def test_an_engine_starts_from_what_is_written() -> None:
    """Every stage, recipe and offloading: the config is valid, and the engine that
    `deepspeed.initialize` makes of it is the plan."""
    with fake_ranks(3):
        for choice in small_choices(3):
            beside = {} if choice.job.recipe.is_json else deepspeed_config(choice.job)  # a cast, a library's optimizer
            engine = build_engine(choice.job, {**beside, **json.loads(ds_config_text(choice))})

            assert engine.zero_optimization_stage() == choice.plan.case.zero_stage
            assert engine.train_micro_batch_size_per_gpu() == choice.plan.micro_batch_size
            assert engine.train_batch_size() == choice.plan.train_batch_size


def test_changes_that_only_work_together_are_found() -> None:
    # GIVEN a job, and a GPU on which no change that leaves the learning alone makes it fit, but two
    # together do
    profile = jobs.profile("gpt2-xl", model__num_layers=24, model__vocab_size=32000, workload__sequence_length=1024)
    start = Setting(3, 64, "bf16-full", Offload.NONE, 12, checkpointing=False, zero_init=False, sequence_length=1024)
    pinned = {"stages": (3,), "recipes": ("bf16-full",), "micro_batches": (12,), "checkpointing": (False,)}
    tiny = Judge(question(2 << 30, profile, offloads=(Offload.NONE,), **pinned))
    begun = tiny(start)
    assert begun is not None
    learning = ("--recipe", "--sequence-length", "--gpus")
    alone = min(c.plan.peak_bytes for c in all_changes(tiny, begun) if c.things == 1 and not c.flag.startswith(learning))
    pairs = [start.but(checkpointing=True, micro_batch_size=1), start.but(checkpointing=True, offload=Offload.OPTIMIZER)]
    both = min(judged.plan.peak_bytes for pair in pairs if (judged := tiny.roughly(pair)) is not None)
    assert both * 1.2 < alone
    room = int(alone * 0.99)

    outlook = answer(Judge(question(int(room / 0.9) + (628 << 20), profile, offloads=(Offload.NONE,), **pinned)), 64).outlook

    # THEN they are told, after what does alone and before what does not fit
    assert not outlook.plans
    together = [change for change in outlook.changes if change.things > 1]
    assert together
    assert all(change.plan.fits and change.things == 2 for change in together)
    fits = [change.plan.fits for change in outlook.changes]
    assert fits == sorted(fits, reverse=True)
    assert any("--activation-checkpointing" in change.flag for change in together)
    assert not any("--sp" in line for line in outlook.beyond), "DeepSpeed's Ulysses does not know this model"
