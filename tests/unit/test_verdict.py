"""One verdict: what is judged, by which numbers, and that it is the same whoever asks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jobs
import pytest
import report_fixtures as fixtures

from bf16prof.closed_form.predict import predict
from bf16prof.planning.judge import Judge
from bf16prof.planning.question import Question, Setting
from bf16prof.profiles.beside import beside_the_allocator
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import Item, MemoryRecord, OutOfMemory
from bf16prof.step_records import PhaseMemory
from bf16prof.verdict import (
    MARGIN,
    MARGIN_EXPANDABLE,
    Allocator,
    Replays,
    allocator_limit,
    device_total,
    gpu_limit,
    judge,
    judged,
    of_a_run,
)
from bf16prof.vocabulary import Component, Device, Offload, Phase, Source, Verdict

GIB = 2**30
GPU = find_gpu("h100-80gb")
LIMIT = gpu_limit(GPU, 4)


def record(source: Source, **values: Any) -> MemoryRecord:
    usual = {"gpu": GPU.id, "limit_bytes": LIMIT, "allocated_bytes": 10 * GIB, "peak_allocated_bytes": 20 * GIB}
    return MemoryRecord(source, fixtures.case(), values.pop("device", Device.GPU), 1000, **{**usual, **values})


def answer(found: MemoryRecord) -> Verdict | None:
    said = judge(found)
    return said.verdict if said else None


def shortage(**values: Any) -> OutOfMemory:
    usual: dict[str, Any] = {
        "phase": Phase.BACKWARD, "step": 1, "tensor": "x", "requested_bytes": GIB, "allocated_bytes": 70 * GIB,
        "reserved_bytes": 78 * GIB, "limit_bytes": LIMIT, "holders": {},
    }  # fmt: skip
    return OutOfMemory(**{**usual, **values})


def test_the_limit_is_the_gpu_less_what_lives_beside_the_allocator() -> None:
    assert GPU.memory_bytes - sum(item.bytes for item in beside_the_allocator(4, (9, 0))) == LIMIT
    assert gpu_limit(GPU, 1) > LIMIT, "one rank has no NCCL buffers"
    assert allocator_limit(dataclasses.replace(record(Source.ESTIMATE), limit_bytes=None)) == LIMIT


@pytest.mark.parametrize("source", [Source.ESTIMATE, Source.SIMULATE])
@pytest.mark.parametrize(("beyond", "expected"), [(1, Verdict.DOES_NOT_FIT), (0, Verdict.TIGHT)])
def test_more_bytes_than_the_limit_do_not_fit_whatever_the_allocator_does(source: Source, beyond: int, expected: Verdict) -> None:
    over = record(source, run_peak_allocated_bytes=LIMIT + beyond, reserved_bytes=LIMIT + 1)
    assert answer(over) is expected


def test_the_whole_run_counts_and_not_the_training_steps_alone() -> None:
    assert answer(record(Source.ESTIMATE, run_peak_allocated_bytes=LIMIT + 1, reserved_bytes=None)) is Verdict.DOES_NOT_FIT


@pytest.mark.parametrize(("over", "expected"), [(0, Verdict.FITS), (1, Verdict.TIGHT)])
def test_a_replay_keeps_its_margin_and_a_dry_run_needs_none(over: int, expected: Verdict) -> None:
    room = int(LIMIT * 0.9)
    assert answer(record(Source.ESTIMATE, reserved_bytes=room + over, margin=0.1)) is expected
    assert answer(record(Source.SIMULATE, reserved_bytes=LIMIT + over)) is expected


def test_a_peak_without_a_replay_fits_only_where_the_allocator_cannot_matter() -> None:
    room = int(LIMIT * 0.9)
    assert answer(record(Source.ESTIMATE, peak_allocated_bytes=room // 2, margin=0.1)) is Verdict.FITS
    assert answer(record(Source.ESTIMATE, peak_allocated_bytes=room // 2 + 1, margin=0.1)) is Verdict.TIGHT


def test_a_dry_run_that_runs_out_of_memory_is_tight_where_the_bytes_fit() -> None:
    short = record(Source.SIMULATE, run_peak_allocated_bytes=LIMIT - 1, reserved_bytes=LIMIT + 1, out_of_memory=shortage())
    assert answer(short) is Verdict.TIGHT
    assert answer(dataclasses.replace(short, run_peak_allocated_bytes=LIMIT + 1)) is Verdict.DOES_NOT_FIT


def test_a_log_that_ran_out_of_memory_is_judged_by_what_was_asked_for() -> None:
    cut_off = record(Source.IMPORT, peak_allocated_bytes=70 * GIB, out_of_memory=shortage())
    assert answer(cut_off) is Verdict.TIGHT
    assert answer(dataclasses.replace(cut_off, out_of_memory=shortage(requested_bytes=9 * GIB))) is Verdict.DOES_NOT_FIT


@pytest.mark.parametrize(
    "unknown",
    [
        fixtures.bare_record(),
        record(Source.ESTIMATE, device=Device.CPU),
        record(Source.ESTIMATE, peak_allocated_bytes=None),
        record(Source.ESTIMATE, gpu="a card of tomorrow", limit_bytes=None),
        record(Source.SIMULATE, reserved_bytes=None),
        record(Source.IMPORT),
        record(Source.MEASURE),
    ],
    ids=["nothing known", "CPU", "no peak", "unknown GPU", "older dry run", "log", "older measurement"],
)
def test_who_cannot_tell_gives_no_verdict(unknown: MemoryRecord) -> None:
    assert judge(unknown) is None
    assert judged(unknown).verdict is None


def test_what_is_held_between_steps_alone_may_be_too_much() -> None:
    assert answer(record(Source.ESTIMATE, peak_allocated_bytes=None, allocated_bytes=LIMIT + 1)) is Verdict.DOES_NOT_FIT


@pytest.mark.parametrize(
    ("finished", "ran_out", "expected"), [(True, False, Verdict.FITS), (False, True, Verdict.DOES_NOT_FIT), (False, False, None)]
)
def test_what_has_run_fits(finished: bool, ran_out: bool, expected: Verdict | None) -> None:
    ran = of_a_run(
        record(Source.MEASURE, limit_bytes=None, reserved_bytes=30 * GIB, device_bytes=32 * GIB),
        GPU, finished=finished, out_of_memory=ran_out,
    )  # fmt: skip
    assert ran.verdict is answer(ran) is expected
    assert ran.limit_bytes == GPU.memory_bytes - 2 * GIB, "what NVML saw beside the allocator is known"
    assert of_a_run(ran, None, finished=True, out_of_memory=False) == ran, "a CPU has no verdict"


def test_the_limit_of_a_record_that_does_not_say_it() -> None:
    context = Item(Component.WORKSPACE, "CUDA context", 500, "assumed")
    dry = record(Source.SIMULATE, limit_bytes=None)
    assert allocator_limit(dataclasses.replace(dry, out_of_memory=shortage(limit_bytes=7), device_items=(context,))) == 7
    assert allocator_limit(dataclasses.replace(dry, device_items=(context, context))) == GPU.memory_bytes - 1000
    assert allocator_limit(dataclasses.replace(dry, gpu="a card of tomorrow", device_items=(context,))) is None
    assert allocator_limit(dry) is None, "what the process holds besides is not known"


def test_a_gpu_is_known_by_its_id_and_by_the_name_that_torch_gives_it() -> None:
    assert device_total(record(Source.MEASURE, gpu="NVIDIA H100 80GB HBM3")) == device_total(record(Source.MEASURE)) == GPU.memory_bytes


def test_the_margin_is_smaller_with_expandable_segments_and_can_be_said() -> None:
    assert Allocator().share_to_keep == MARGIN > Allocator(expandable=True).share_to_keep == MARGIN_EXPANDABLE
    assert Allocator(margin=0.3).share_to_keep == 0.3


# Estimate and plan.

CHOICES = [(stage, recipe, offload) for stage in (0, 1, 2, 3) for recipe in ("bf16-fp32-master", "fp32") for offload in Offload]


@pytest.mark.parametrize("gib", [6, 16])
@pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])
def test_estimate_and_plan_say_the_same_of_every_job(gib: int, expandable: bool) -> None:
    # GIVEN a model on GPUs on which some of its jobs fit, some are tight and some do not fit
    profile = jobs.profile("gpt2-xl", model__num_layers=3, workload__sequence_length=512)
    gpu = dataclasses.replace(find_gpu("a10-24gb"), id="small", memory_bytes=gib << 30)
    question = Question(profile, gpu, (0, 1, 2, 3), ("bf16-fp32-master",), (1,), expandable=expandable, may_change_init=False)
    seen = set()

    for stage, recipe, offload in CHOICES:
        for micro in (1, 24):
            setting = Setting(stage, 2, recipe, offload, micro, checkpointing=False, zero_init=False, sequence_length=512)
            plan = Judge(question)(setting)
            if plan is None:
                continue

            # WHEN each is judged by both commands' ways
            estimate = predict(question.job(setting), allocator=Allocator(expandable))

            # THEN the verdict is one, whether the allocator is replayed where it decides or
            # everywhere
            assert plan.plan.verdict is estimate.verdict is answer(estimate)
            assert predict(question.job(setting), allocator=Allocator(expandable), replays=Replays.ALL).verdict is estimate.verdict
            assert plan.plan.fits is (estimate.verdict is Verdict.FITS)
            seen.add(estimate.verdict)

    assert {Verdict.FITS, Verdict.DOES_NOT_FIT} <= seen


def test_where_only_init_does_not_fit_what_does_is_said() -> None:
    # GIVEN a model that ZeRO-3 has no room to build whole
    job = jobs.job(jobs.profile("llama3-8b"), 3, 8, "bf16-full")
    small = dataclasses.replace(job, gpu=dataclasses.replace(GPU, memory_bytes=15 * GIB))
    workload = {"workload__zero_init": True, "workload__sequence_length": 128, "workload__activation_checkpointing": True}
    inside = dataclasses.replace(small, profile=jobs.profile("llama3-8b", **workload))
    whole = dataclasses.replace(
        inside, profile=inside.profile.model_copy(update={"workload": inside.profile.workload.model_copy(update={"zero_init": False})})
    )

    found, better = predict(whole), predict(inside)

    assert found.verdict is Verdict.DOES_NOT_FIT
    assert found.phases[Phase.INIT].peak_bytes == found.run_peak_allocated_bytes
    assert found.inside_zero_init_bytes == better.run_peak_allocated_bytes
    assert (better.run_peak_allocated_bytes or 0) < (found.limit_bytes or 0)
    assert better.inside_zero_init_bytes is None


def test_init_is_not_blamed_where_a_step_does_not_fit_either() -> None:
    job = dataclasses.replace(jobs.job(jobs.profile("llama3-8b"), 3, 8, "bf16-full"), gpu=dataclasses.replace(GPU, memory_bytes=2 * GIB))
    assert predict(job).inside_zero_init_bytes is None


def test_host_memory_is_said_of_a_rank_and_of_a_node() -> None:
    for ranks, per_node, times in ((16, 8, 8), (4, 8, 4)):
        job = jobs.job(jobs.profile("gpt2-xl", workload__sequence_length=128), 2, ranks, "bf16-fp32-master", offload=Offload.OPTIMIZER)
        found = predict(job, per_node)
        assert found.host_bytes
        assert found.host_bytes_per_node == found.host_bytes * times


def test_the_phase_that_sets_the_peak_is_named() -> None:
    phases = {Phase.INIT: PhaseMemory(LIMIT + 1, 0), Phase.BACKWARD: PhaseMemory(20 * GIB, 0)}
    found = judge(record(Source.ESTIMATE, run_peak_allocated_bytes=LIMIT + 1, phases=phases))
    assert found is not None
    assert found.phase is Phase.INIT
    assert found.free_bytes == -1
