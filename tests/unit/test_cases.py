"""From selections to cases: the order, the offloading, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from jobs import profile, small_profile

from bf16prof.cases import Selection, check_profile, expand, offload_of
from bf16prof.errors import InputError, Refused
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.records import Case
from bf16prof.vocabulary import Device, Offload


def selection(**changes: object) -> Selection:
    base = Selection(small_profile(), [3], [2], ["bf16-full"], Device.CPU)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_cases_come_by_stage_then_ranks_then_recipe_each_once() -> None:
    jobs = expand(selection(stages=[3, 1, 3], world_sizes=[4, 2, 4], recipes=["fp32", "bf16-full", "fp32"]))

    assert [job.case.label for job in jobs] == [
        "zero3-w4-fp32", "zero3-w4-bf16-full", "zero3-w2-fp32", "zero3-w2-bf16-full",
        "zero1-w4-fp32", "zero1-w4-bf16-full", "zero1-w2-fp32", "zero1-w2-bf16-full",
    ]  # fmt: skip


def test_without_recipes_all_that_need_nothing_but_deepspeed_are_meant() -> None:
    found = [job.case.recipe for job in expand(selection(recipes=[]))]

    assert found == [
        "fp32", "bf16-fp32-master", "fp16-fp32-master", "bf16-master", "bf16-full", "bf16-full-autocast", "autocast-fp32",
    ]  # fmt: skip
    assert set(found) < set(runnable_recipes())


@pytest.mark.parametrize("stage", [-1, 4, 30])
def test_an_unknown_stage_is_refused(stage: int) -> None:
    with pytest.raises(InputError, match=rf"--zero {stage}: the ZeRO stage is 0, 1, 2 or 3"):
        expand(selection(stages=[1, stage]))


@pytest.mark.parametrize("size", [0, -2, 2**20 + 1, 10**30])
def test_an_impossible_number_of_ranks_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=rf"--gpus {size}: expected a number of ranks"):
        expand(selection(world_sizes=[2, size]))


def test_recipes_are_known_and_runnable() -> None:
    with pytest.raises(InputError, match="unknown recipe 'int8'"):
        expand(selection(recipes=["int8"]))
    with pytest.raises(Refused, match="no DeepSpeed engine runs nemo-bf16") as caught:
        expand(selection(recipes=["nemo-bf16"]))
    assert "bf16-fp32-master" in caught.value.hint


@pytest.mark.parametrize("asked", list(Offload))
@pytest.mark.parametrize("written", list(Offload))
def test_offloading_is_what_was_asked_whatever_the_profile_says(written: Offload, asked: Offload) -> None:
    # GIVEN a profile that offloads in one way
    zero: dict[str, Any] = {
        "offload_optimizer": {"device": "none" if written is Offload.NONE else "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu" if written is Offload.OPTIMIZER_AND_PARAMETERS else "none"},
    }
    settings = small_profile(**zero)
    assert offload_of(settings) is written

    # WHEN nothing is asked, THEN that is the case; WHEN another way is asked, THEN it is that one,
    # and other settings stay
    (as_written,) = expand(selection(profile=settings))
    (job,) = expand(selection(profile=settings, offload=asked))
    assert as_written.case.offload is written
    assert job.case.offload is offload_of(job.profile) is asked
    assert job.profile.deepspeed.zero_optimization.offload_optimizer.pin_memory is False


def test_labels_tell_cases_of_a_profile_apart_and_are_folder_names() -> None:
    jobs = [
        job for offload in Offload for job in expand(selection(stages=[0, 1, 2, 3], world_sizes=[1, 11, 111], recipes=[], offload=offload))
    ]
    labels = {job.case.label for job in jobs}

    assert len(labels) == len(jobs)
    assert not [label for label in labels if set(label) & set("/\\ :\n")]
    assert Case("p", 2, 8, "fp32", Offload.OPTIMIZER).label == "zero2-w8-fp32-offload-optimizer"


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"workload.sequence_length \(129\) is longer than model.max_sequence_length \(128\)"):
        check_profile(profile("cpu-demo", workload__sequence_length=129))
