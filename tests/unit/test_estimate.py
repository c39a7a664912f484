"""The closed form against published measurements, against sums written out by hand, and against
what must hold for any sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jobs import job, profile, small_profile
from published import rows

from bf16prof.cases import Job
from bf16prof.closed_form.predict import predict
from bf16prof.documents import as_json
from bf16prof.engine.constraints import refusal_reason
from bf16prof.engine.workspace import cublas_workspace_bytes
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import TRAINING, Component, Device, Offload, Phase, Source

GIB = 2**30
C = Component
BASELINE, LOW = rows("example README", "allocated")
RECIPES = list(runnable_recipes())


def small_job(stage: int, world: int, recipe: str, *, device: Device = Device.GPU, offload: Offload | None = None, **zero: Any) -> Job:
    return job(small_profile(**zero), stage, world, recipe, device=device, offload=offload)


def items(record: MemoryRecord) -> dict[str, int]:
    return {item.name: item.bytes for item in record.items}


@pytest.mark.parametrize(("recipe", "row"), [("bf16-fp32-master", BASELINE), ("bf16-full-autocast", LOW)])
def test_the_published_measurement_on_four_h100(recipe: str, row: dict[str, float]) -> None:
    record = predict(job(profile("deepspeed-bf16-example"), 3, 4, recipe))

    assert record.parameters == row["parameters"]
    assert record.allocated_bytes is not None
    assert record.allocated_bytes / GIB == pytest.approx(row["value"], rel=0.002)


@pytest.mark.parametrize(("recipe", "gib"), [("bf16-fp32-master", 25.74), ("bf16-full-autocast", 16.17)])
def test_the_published_measurement_to_its_last_digit_with_the_scripts_default_vocabulary(recipe: str, gib: float) -> None:
    """The run was made with the script's default vocabulary of 50,000 words."""
    record = predict(job(profile("deepspeed-bf16-example", model__vocab_size=50_000), 3, 4, recipe))

    assert record.allocated_bytes is not None
    assert round(record.allocated_bytes / GIB, 2) == gib


@pytest.mark.parametrize(("recipe", "replayed"), [("bf16-fp32-master", 27_583_506_432), ("bf16-full-autocast", 17_296_495_104)])
def test_storages_are_those_of_the_replay_of_deepspeed(recipe: str, replayed: int) -> None:
    """Bytes of all storages of a replay of DeepSpeed, cuBLAS apart. A few scalars and token ids
    differ."""
    record = predict(job(profile("deepspeed-bf16-example"), 3, 4, recipe))

    assert record.allocated_bytes is not None
    assert record.allocated_bytes - items(record)["cuBLAS workspaces"] == pytest.approx(replayed, abs=8192)


def test_stage_2_by_hand() -> None:
    """6,535 parameters: embeddings 31*12 + 9*12, head 31*12 + 31, three layers of 36*12+36 +
    12*12+12 + 4*12 + 48*12+48 + 12*48+12 = 1,884.

    Padded to 2 * 4 ranks: 6,536; a rank's partition is 1,634. Ten tokens in a micro-batch.
    """
    record = predict(small_job(2, 4, "bf16-fp32-master"))

    assert record.parameters == 372 + 108 + 372 + 31 + 3 * 1884 == 6535
    assert items(record) == {
        "flat parameters": 2 * 6536,
        "master parameters": 4 * 1634,
        "optimizer state exp_avg": 4 * 1634,
        "optimizer state exp_avg_sq": 4 * 1634,
        "FusedAdam._dummy_overflow_buf": 4,
        "DeepSpeedEngine._global_grad_norm": 4,
        "logits kept by the training loop": 2 * 10 * 31,
        "loss kept by the training loop": 2,
        "input ids kept by the training loop": 8 * 10,
        "labels kept by the training loop": 8 * 10,
        "cuBLAS workspaces": 2 * 32 * 2**20,
        # to the next multiple of 512: 13,072 + 240; 6,536 + 120, three times; 620 + 404; 2 + 510;
        # 80 + 432, twice; 4 + 508, twice
        "blocks rounded up to 512 bytes": 240 + 3 * 120 + 404 + 510 + 2 * 432 + 2 * 508,
    }


def test_stage_3_by_hand() -> None:
    """Seven ranks. Each parameter is cut by itself: 372 -> 54, 108 -> 16; a layer 432 -> 62, 36 ->
    6, 144 -> 21, five of 12 -> 2, 576 -> 83, 48 -> 7, 576 -> 83, 12 -> 2; head 372 -> 54, 31 -> 5.
    A layer's share: 62+6+21+2+4*2+83+7+83+2 = 274; all: 54+16+3*274+54+5 = 951.

    Persistent below 40 elements: per layer 36 and six of 12, and the head's bias of 31, gathered to
    7 times their share: 3 * (42 + 6 * 14) + 35 = 413.
    """
    record = predict(small_job(3, 7, "bf16-full", stage3_param_persistence_threshold=40, sub_group_size=400))

    found = items(record)
    assert found["flat parameters"] == found["gradient partition"] == 2 * 951
    assert found["master parameters"] == found["optimizer state exp_avg"] == found["optimizer state exp_avg_sq"] == 2 * 951
    assert found["persistent parameters"] == 2 * 413
    assert found["reduce bucket"] == 2 * 1000
    assert record.components[C.MASTER_GRADIENTS] == 0, "there are none between steps"


def test_autocast_over_fp32_keeps_a_bucket_for_each_communication_dtype() -> None:
    """runtime/zero/stage3.py: one IPG bucket of reduce_bucket_size elements in bf16 (Linear
    weights) and one in fp32 (the rest)."""
    record = predict(small_job(3, 2, "autocast-fp32"))

    assert items(record)["reduce bucket"] == 1000 * (2 + 4)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    """Stage 2, 4 ranks, partition 1,634, largest parameter 576 elements (zero/stage_1_and_2.py,
    __init__).

    Host: master 4 * 1,634, both moments, fp32 gradients, a bf16 copy, a buffer of the largest
    parameter, and the gradient norm, computed there (one fp32). Device: that buffer too.
    """
    record = predict(small_job(2, 4, "bf16-fp32-master", offload=Offload.OPTIMIZER))

    assert record.host_bytes == (4 + 8 + 4 + 2) * 1634 + 2 * 576 + 4
    assert items(record)["gradient buffer for offloading"] == 2 * 576
    assert {c for c in (C.MASTER_PARAMETERS, C.MOMENTUM, C.VARIANCE) if record.components[c]} == set()


def test_ranks_on_a_cpu_have_one_memory_and_no_cublas() -> None:
    gpu, cpu = (predict(small_job(2, 4, "bf16-fp32-master", offload=Offload.OPTIMIZER, device=d)) for d in (Device.GPU, Device.CPU))

    assert cpu.host_bytes is None
    assert cpu.components[C.ROUNDING] == 0
    assert "cuBLAS workspaces" not in items(cpu)
    assert gpu.allocated_bytes is not None
    assert gpu.host_bytes is not None
    added = items(gpu)["cuBLAS workspaces"] + gpu.components[C.ROUNDING]
    assert cpu.allocated_bytes == gpu.allocated_bytes - added + gpu.host_bytes


@pytest.mark.parametrize(("gpu", "mib"), [("h100-80gb", 32), ("h200-141gb", 32), ("a100-80gb", 8.125), ("rtx-4090-24gb", 8.125)])
def test_cublas_workspace_is_pytorchs_default(gpu: str, mib: float) -> None:
    """PyTorch's documentation of CUBLAS_WORKSPACE_CONFIG: 32 MiB on Hopper, else :4096:2:16:8 = 2 *
    4096 KiB + 8 * 16 KiB = 8.125 MiB."""
    assert cublas_workspace_bytes(find_gpu(gpu)) == mib * 2**20


def test_what_the_closed_form_does_not_know_is_null() -> None:
    record = predict(small_job(3, 4, "bf16-full"))

    assert (record.source, record.gpu) == (Source.ESTIMATE, "h100-80gb")
    written = as_json(record)
    for name in ("reserved_bytes", "device_bytes", "step_time_s", "loss"):
        assert written[name] is None
    assert all(memory.peak_bytes is not None for memory in record.phases.values())
    assert set(record.phases) == {Phase.INIT, *TRAINING}


@given(
    st.integers(0, 3),
    st.integers(1, 70),
    st.sampled_from(RECIPES),
    st.sampled_from(list(Offload)),
    st.integers(0, 600),
    st.integers(1, 9000),
    st.sampled_from(list(Device)),
)
@settings(deadline=None, max_examples=150)
def test_components_add_up_for_any_case(  # noqa: PLR0917 - hypothesis draws them
    stage: int, world: int, recipe: str, offload: Offload, threshold: int, sub_group: int, device: Device
) -> None:
    case = small_job(stage, world, recipe, offload=offload, device=device, param_persistence_threshold=threshold, sub_group_size=sub_group)
    assume(refusal_reason(case) is None)

    record = predict(case)

    assert record.allocated_bytes == sum(record.components.values()) == sum(item.bytes for item in record.items)
    assert all(size >= 0 for size in record.components.values())
    for component in Component:
        assert record.components.get(component, 0) == sum(item.bytes for item in record.items if item.component is component)
    assert all(item.source for item in record.items)
    assert record.components[C.OTHER] == 0
    assert device is Device.CPU or record.allocated_bytes % 512 == 0


@given(st.integers(1, 70), st.sampled_from(RECIPES), st.integers(1, 9000))
@settings(deadline=None, max_examples=50)
def test_all_ranks_together_hold_every_parameter_at_stage_3(world: int, recipe: str, sub_group: int) -> None:
    case = small_job(3, world, recipe, sub_group_size=sub_group)
    assume(refusal_reason(case) is None)

    record = predict(case)

    element = {"fp32": 4, "autocast-fp32": 4}.get(recipe, 2)
    together = items(record)["flat parameters"] * world
    assert 6535 * element <= together < (6535 + 40 * world) * element, "40 tensors, each padded by less than an element per rank"


@given(st.sampled_from(RECIPES), st.integers(0, 600))
@settings(deadline=None, max_examples=30)
def test_on_one_rank_persistent_parameters_cost_nothing(recipe: str, threshold: int) -> None:
    """A parameter gathered from one rank is its own partition (partition_parameters.py,
    NoGatherHandle)."""
    one, none = (small_job(3, 1, recipe, param_persistence_threshold=t) for t in (threshold, 0))
    assume(refusal_reason(one) is None)

    assert predict(one).allocated_bytes == predict(none).allocated_bytes


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "bf16-master"])
def test_more_ranks_and_fewer_bytes(stage: int, recipe: str) -> None:
    sizes = [predict(job(profile("gpt2-xl"), stage, world, recipe)).allocated_bytes or 0 for world in (1, 2, 4, 8, 64, 512)]

    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_stage_0_does_not_depend_on_the_number_of_ranks() -> None:
    sizes = {predict(job(profile("gpt2-xl"), 0, world, "bf16-fp32-master")).allocated_bytes for world in (1, 2, 512)}

    assert len(sizes) == 1


def test_the_ratio_of_offloaded_sub_groups_keeps_the_others_on_the_gpu() -> None:
    """Stage 3, seven ranks, partitions in sub-groups of at least 400 elements (see above for the
    shares): embeddings, the first layer and 62 of the second, 54 + 16 + 274 + 62 = 406; then 401;
    then 144. int((1 - 0.5) * 3) = 1 of them stays: 406 elements.
    """
    whole, half = (
        predict(small_job(3, 7, "bf16-fp32-master", sub_group_size=400, offload_optimizer={"device": "cpu", "ratio": ratio}))
        for ratio in (1.0, 0.5)
    )  # fmt: skip

    assert whole.components[C.MASTER_PARAMETERS] == 0
    assert half.components[C.MASTER_PARAMETERS] == half.components[C.MOMENTUM] == half.components[C.VARIANCE] == 4 * 406
