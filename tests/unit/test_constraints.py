"""Refusals: every rule against DeepSpeed itself where DeepSpeed refuses, and by its reason where
DeepSpeed spoils a run in silence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jobs
import pytest
from fake_ranks import DEEPSPEED_WARNINGS, build_engine, fake_ranks

from bf16prof.cases import Job
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.engine.config import deepspeed_config
from bf16prof.engine.constraints import RULES, admit, alternatives, refusal_reason
from bf16prof.errors import Refused
from bf16prof.profiles.identity import PLACES, recorded, workload_digest
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.reports.asked import settings
from bf16prof.vocabulary import Device, Offload

pytestmark = DEEPSPEED_WARNINGS

RECIPES = list(runnable_recipes())
OFFLOADS = list(Offload)
SILENT = "accepted by DeepSpeed"


@pytest.fixture
def two_ranks() -> Iterator[None]:
    with fake_ranks(2):
        yield


def a_job(
    stage: int, recipe: str = "bf16-fp32-master", *, offload: Offload | None = None, torch_adam: bool = False, **deepspeed: Any
) -> Job:
    """A job of the small profile; keywords are keys of DeepSpeed's JSON."""
    settings = jobs.small_profile()
    table = {**settings.model_dump(exclude_unset=True), "deepspeed": deepspeed, "optimizer": {"torch_adam": torch_adam}}
    return jobs.job(type(settings).model_validate(table), stage, 2, recipe, offload=offload, device=Device.CPU)


def rule_reason(config: Mapping[str, Any]) -> str | None:
    """What the rules say of a DeepSpeed configuration that need not come from a profile."""
    return next((reason for rule in RULES if (reason := rule(config))), None)


def deepspeed_refuses(job: Job, config: Mapping[str, Any] | None = None) -> str:
    """DeepSpeed's own words when it refuses to build an engine; empty when it builds one."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        build_engine(job, config)
    except (AssertionError, ValueError, NotImplementedError, ZeRORuntimeException) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ""


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_admitted_deepspeed_builds_and_what_it_rejects_is_refused(stage: int, recipe: str, offload: Offload) -> None:
    job = a_job(stage, recipe, offload=offload)
    reason, theirs = refusal_reason(job), deepspeed_refuses(job)

    if reason is None:
        assert theirs == ""
    if theirs:
        assert reason is not None
    if recipe == "bf16-pure" and stage > 0:  # DeepSpeed runs another recipe in its place, with a master copy
        assert reason is not None
        assert "master copy" in reason
    elif (
        reason and not theirs
    ):  # the only other cases that we refuse and DeepSpeed does not: offloading where it cannot work, or does nothing
        assert offload is not Offload.NONE
        assert "offload" in reason
        assert stage == 0 or (offload is Offload.OPTIMIZER_AND_PARAMETERS and stage != 3)


NO_NORM = {"zero_optimization": {"compute_grad_norm": False}}
UNCLIPPED = {**NO_NORM, "gradient_clipping": 0.0}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
ODD_BUCKET = {"zero_optimization": {"allgather_bucket_size": 501}}
HALF_OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
BF16_MASTER = {"recipe": "bf16-master"}
TORCH_OFFLOADED = {"offload": Offload.OPTIMIZER, "torch_adam": True}

REJECTED_BY_DEEPSPEED: dict[str, tuple[dict[str, Any], str, str]] = {
    "compute_grad_norm at stage 0": ({"stage": 0, **UNCLIPPED}, "compute_grad_norm", "ValidationError"),
    "compute_grad_norm at stage 3": ({"stage": 3, **UNCLIPPED}, "compute_grad_norm", "ValidationError"),
    "compute_grad_norm while clipping": ({"stage": 2, **NO_NORM}, "compute_grad_norm", "ValueError"),
    "compute_grad_norm while offloading": ({"stage": 2, **UNCLIPPED, "offload": Offload.OPTIMIZER}, "compute_grad_norm", "ValueError"),
    "compute_grad_norm with BF16_Optimizer": ({"stage": 1, **UNCLIPPED, **FP32_SUMS}, "compute_grad_norm", "ValueError"),
    "fp32 sums of bf16 at stage 0": ({"stage": 0, **FP32_SUMS}, "grad_accum_dtype", "NotImplementedError"),
    "fp32 sums of fp16 at stage 0": ({"stage": 0, "recipe": "fp16-fp32-master", **FP32_SUMS}, "grad_accum_dtype", "NotImplementedError"),
    "bf16 sums of fp32 at stage 0": ({"stage": 0, "recipe": "fp32", **BF16_SUMS}, "grad_accum_dtype", "NotImplementedError"),
    "an odd all-gather bucket at stage 1": ({"stage": 1, **ODD_BUCKET}, "even", "AssertionError"),
    "an odd all-gather bucket at stage 2": ({"stage": 2, **ODD_BUCKET}, "even", "AssertionError"),
    "prescaling at stage 2": ({"stage": 2, "prescale_gradients": True}, "prescale_gradients", "AssertionError"),
    "predividing at stage 3": ({"stage": 3, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor", "AssertionError"),
    "offload ratio at stage 2": ({"stage": 2, **HALF_OFFLOADED}, "ratio", "ValidationError"),
    "offload ratio with torch_adam": ({"stage": 3, "torch_adam": True, **HALF_OFFLOADED}, "ratio", "AssertionError"),
    "bf16 master offloaded to torch_adam at stage 3": ({"stage": 3, **BF16_MASTER, **TORCH_OFFLOADED}, "torch_adam", "AssertionError"),
    "bf16 master offloaded to torch_adam at stage 1": ({"stage": 1, **BF16_MASTER, **TORCH_OFFLOADED}, "torch_adam", "AssertionError"),
    "offloaded bf16-full with torch_adam": ({"stage": 2, "recipe": "bf16-full", **TORCH_OFFLOADED}, "torch_adam", "AssertionError"),
    "bf16 master without offloading": ({"stage": 3, **BF16_MASTER}, "offload_optimizer", "AssertionError"),
    "bf16 master at stage 0": ({"stage": 0, "recipe": "bf16-full"}, "ZeRO stage 1, 2 or 3", "AssertionError"),
}  # fmt: skip


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("case", REJECTED_BY_DEEPSPEED)
def test_what_deepspeed_rejects_is_refused_with_a_reason(case: str) -> None:
    keys, ours, theirs = REJECTED_BY_DEEPSPEED[case]
    job = a_job(**keys)

    reason = refusal_reason(job)

    assert reason is not None
    assert ours in reason
    assert "\n" not in reason
    assert deepspeed_refuses(job).startswith(theirs)


ACCEPTED: dict[str, dict[str, Any]] = {
    "compute_grad_norm off at stage 2": {"stage": 2, **UNCLIPPED},
    "an odd all-gather bucket at stage 3": {"stage": 3, **ODD_BUCKET},
    "prescaling at stage 1": {"stage": 1, "prescale_gradients": True},
    "prescaling at stage 2 without reduce_scatter": {
        "stage": 2, "prescale_gradients": True, "zero_optimization": {"reduce_scatter": False},
    },
    "fp32 sums at stage 2": {"stage": 2, **FP32_SUMS},
    "fp32 sums of bf16-full at stage 3": {"stage": 3, "recipe": "bf16-full", **FP32_SUMS},
    "offload ratio at stage 3": {"stage": 3, **HALF_OFFLOADED},
    "offloading with torch_adam and fp32 master": {"stage": 2, **TORCH_OFFLOADED},
    "both offloaded at stage 3": {"stage": 3, "offload": Offload.OPTIMIZER_AND_PARAMETERS},
}  # fmt: skip


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("case", ACCEPTED)
def test_what_deepspeed_accepts_is_admitted(case: str) -> None:
    job = a_job(**ACCEPTED[case])

    assert refusal_reason(job) is None
    assert deepspeed_refuses(job) == ""


LOW_MASTER = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
RAW: dict[str, tuple[dict[str, Any], str, str]] = {
    "fp16 master weights that are not offloaded": (
        {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "fp16 master weights need", "AssertionError",
    ),
    "both half precisions": ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "together", "AssertionError"),
    "bf16 states without master": (
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "needs bf16_master_weights_and_grads", "AssertionError",
    ),
    "bf16 master without bf16": ({"bf16": LOW_MASTER}, "truncates fp32 weights", SILENT),
    "bf16 master under fp32 sums": ({"bf16": {"enabled": True, **LOW_MASTER}, **FP32_SUMS}, "ignores the bf16 master flags", SILENT),
}  # fmt: skip


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("case", RAW)
def test_configurations_that_no_recipe_makes_are_refused_too(case: str) -> None:
    """What a configuration of the user's own may bring, at stage 1; two of them DeepSpeed accepts
    and spoils."""
    blocks, ours, theirs = RAW[case]
    job = a_job(1, "fp32")
    config = {**deepspeed_config(job), **blocks}

    reason = rule_reason(config)

    assert reason is not None
    assert ours in reason
    assert (deepspeed_refuses(job, config) or SILENT).startswith(theirs)


def test_flags_that_bf16_optimizer_ignores_leave_fp32_masters_behind() -> None:
    """The spoiled run itself: DeepSpeed was asked for bf16 masters and keeps fp32 ones without a
    word."""
    import torch

    job = a_job(1, "bf16-full", data_types={"grad_accum_dtype": "fp32"})
    with fake_ranks(2):
        optimizer = build_engine(job).optimizer

    assert refusal_reason(job) is not None
    assert type(optimizer).__name__ == "BF16_Optimizer"
    assert optimizer.fp32_groups_flat_partition[0].dtype == torch.float32


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_secondary_partitions_must_divide_the_ranks(stage: int, ranks: int) -> None:
    job = dataclasses.replace(a_job(stage, zero_optimization={"zero_hpz_partition_size": 2}))
    job = dataclasses.replace(job, case=dataclasses.replace(job.case, world_size=ranks))

    assert bool(refusal_reason(job)) == (stage == 3 and ranks == 3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_offloaded_parameters_that_nobody_asked_for_by_flag_are_ignored_below_stage_3(stage: int) -> None:
    both = {"offload_param": {"device": "cpu"}, **({"offload_optimizer": {"device": "cpu"}} if stage else {})}

    job = a_job(stage, zero_optimization=both)

    assert refusal_reason(job) is None
    assert job.case.offload is (Offload.OPTIMIZER if stage else Offload.NONE)


def test_parameters_offloaded_alone_are_not_modelled() -> None:
    job = a_job(3, zero_optimization={"offload_param": {"device": "cpu"}})

    assert "offload both" in (refusal_reason(job) or "")


def test_bf16_full_at_stage_0_is_refused_with_what_works_there() -> None:
    with pytest.raises(Refused) as caught:
        admit([a_job(0, "bf16-full")])

    assert caught.value.exit_code == 2
    assert caught.value.message.startswith("zero0-w2-bf16-full: ")
    assert "stage 1, 2 or 3" in caught.value.message
    offered = caught.value.hint.removeprefix("recipes that work here: ").split(", ")
    assert 1 <= len(offered) <= 3
    assert offered[0] == "bf16-pure"
    assert all(refusal_reason(a_job(0, id_)) is None for id_ in offered)


def test_where_nothing_works_nothing_is_offered() -> None:
    with pytest.raises(Refused) as caught:
        admit([a_job(0, "bf16-full", offload=Offload.OPTIMIZER)])

    assert caught.value.hint == ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_master_without_offloading_says_how_to_offload(stage: int) -> None:
    with pytest.raises(Refused) as caught:
        admit([a_job(stage, "bf16-master")])

    assert "bf16-master with --offload optimizer" in caught.value.hint
    assert refusal_reason(a_job(stage, "bf16-master", offload=Offload.OPTIMIZER)) is None


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.OPTIMIZER])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_alternatives_work_as_they_are_offered(stage: int, recipe: str, offload: Offload) -> None:
    offers = alternatives(a_job(stage, recipe, offload=offload))

    assert bool(offers) == (stage > 0 or offload is Offload.NONE), "nothing can be offloaded at stage 0"
    for offer in offers:
        id_, offloaded, _ = offer.partition(" with --offload optimizer")
        assert refusal_reason(a_job(stage, id_, offload=Offload.OPTIMIZER if offloaded else offload)) is None


def test_some_refused_some_admitted_is_no_error() -> None:
    jobs_ = [a_job(stage, "bf16-full") for stage in (0, 1, 2)]

    admitted, refused = admit(jobs_)

    assert [job.case.zero_stage for job in admitted] == [1, 2]
    assert [refusal.case.zero_stage for refusal in refused] == [0]
    assert "bf16-full" not in refused[0].alternatives


def test_a_library_optimizer_that_counts_calls_needs_one_sub_group() -> None:
    small = refusal_reason(a_job(3, "bf16-kahan", zero_optimization={"sub_group_size": 100}))
    assert small is not None
    size = int(small.rpartition("=")[2])

    assert "once per sub-group" in small
    assert refusal_reason(a_job(3, "bf16-kahan", zero_optimization={"sub_group_size": size})) is None
    assert refusal_reason(a_job(2, "bf16-kahan", zero_optimization={"sub_group_size": 100})) is None
    assert refusal_reason(a_job(3, "bf16-stochastic-rounding", zero_optimization={"sub_group_size": 100})) is None


def test_a_library_optimizer_changes_nothing_but_the_precision() -> None:
    job = a_job(0, "bf16-kahan")
    adam = job.profile.model_copy(update={"optimizer": job.profile.optimizer.model_copy(update={"type": "Adam"})})

    assert refusal_reason(job) is None
    assert "is an AdamW" in str(refusal_reason(dataclasses.replace(job, profile=adam)))


@pytest.mark.parametrize(("more", "said"), [
    ({"stage": 2}, "at stage 3 only"),
    ({"nvme_path": None}, "needs a path"),
    ({"ratio": 0.5}, "below 1"),
    ({"buffer_count": 3}, "Adam needs 4"),
    ({"torch_adam": True}, "DeepSpeedCPUAdam"),
    ({"device": Device.CPU}, "async_io"),
    ({}, ""),
])  # fmt: skip
def test_an_optimizer_on_nvme_needs_what_deepspeed_swaps_with(more: dict[str, Any], said: str) -> None:
    keys: dict[str, Any] = {"device": "nvme", "nvme_path": "/x"}
    keys |= {key: more[key] for key in ("nvme_path", "ratio", "buffer_count") if key in more}
    settings = {"optimizer__torch_adam": more.get("torch_adam", False), "optimizer__fused": None}
    on_nvme = jobs.profile(deepspeed__zero_optimization__offload_optimizer=keys, **settings)
    each = jobs.job(on_nvme, more.get("stage", 3), device=more.get("device", Device.GPU))

    assert said in (refusal_reason(each) or "")
    assert "left to the dry run" in str(closed_form_gap(each))


def test_where_files_lie_makes_no_other_case() -> None:
    here, there = (
        jobs.profile(deepspeed__zero_optimization__offload_optimizer={"device": "nvme", "nvme_path": path}) for path in ("/a", "/b")
    )

    assert workload_digest(here) == workload_digest(there)
    assert "nvme_path" not in str(here.model_dump(exclude=PLACES))
    assert "nvme_path" not in str(recorded(here))
    assert not [key for key in settings(here.model_dump(mode="json"), {}) if "nvme_path" in key]
