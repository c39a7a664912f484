"""The peaks of the closed form: the published example's numbers, and what must hold for every
job."""

from __future__ import annotations

import pytest

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.predict import predict
from bf16prof.engine.constraints import admit
from bf16prof.models.shapes import inventory
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.records import MemoryRecord, peak_phase
from bf16prof.vocabulary import TRAINING, Device, Offload, Phase

GIB = 2**30
SMALL = (
    "model.hidden_size=64",
    "model.vocab_size=1000",
    "model.num_layers=5",
    "model.num_heads=4",
    "workload.sequence_length=32",
    "optimizer.torch_adam=false",
)
ZERO = "deepspeed.zero_optimization"


def job(recipe: str, stage: int, world: int, *sets: str, profile: str = "cpu-demo", offload: Offload | None = None) -> Job:
    chosen = load_profile(profile, [parse_set(each) for each in sets]).profile
    return admit(expand(Selection(chosen, [stage], [world], [recipe], Device.GPU, find_gpu("h100-80gb"), offload)))[0][0]


def small(stage: int, *sets: str, recipe: str = "bf16-fp32-master", world: int = 4) -> MemoryRecord:
    return predict(job(recipe, stage, world, *SMALL, "optimizer.fused=false", *sets))


@pytest.mark.parametrize(
    ("recipe", "allocated", "peak", "phase"),
    [("bf16-fp32-master", 25.74, 31.38, Phase.STEP), ("bf16-full-autocast", 16.17, 18.84, Phase.BACKWARD)],
)
def test_the_published_example(recipe: str, allocated: float, peak: float, phase: Phase) -> None:
    record = predict(job(recipe, 3, 4, "model.vocab_size=50000", profile="deepspeed-bf16-example"))

    assert (record.allocated_bytes or 0) / GIB == pytest.approx(allocated, rel=0.01)
    assert (record.peak_allocated_bytes or 0) / GIB == pytest.approx(peak, rel=0.01)
    assert record.peak_phase is phase


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["transformer-postln", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", ["fp32", "bf16-fp32-master", "autocast-fp32"])
def test_what_holds_for_every_job(stage: int, family: str, recipe: str) -> None:
    record = small(stage, f"model.family={family}", recipe=recipe)

    assert list(record.phases) == [Phase.INIT, *TRAINING]
    assert all((memory.peak_bytes or 0) >= (memory.end_bytes or 0) > 0 for memory in record.phases.values())
    assert record.phases[Phase.STEP].end_bytes == record.allocated_bytes
    assert record.peak_phase is peak_phase(record.phases)
    assert sum(item.bytes for item in record.peak_items) == record.peak_allocated_bytes
    assert all(item.bytes > 0 for item in record.peak_items)
    assert all(item.source for item in record.peak_items)
    assert (record.run_peak_allocated_bytes or 0) >= (record.peak_allocated_bytes or 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpointing_never_raises_the_peak_of_forward(stage: int) -> None:
    without, with_ = (small(stage, f"workload.activation_checkpointing={flag}") for flag in ("false", "true"))

    assert (with_.phases[Phase.FORWARD].peak_bytes or 0) < (without.phases[Phase.FORWARD].peak_bytes or 0)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 9])
def test_layers_beyond_the_third_add_the_same(layers: int) -> None:
    one, two, three = (
        small(0, f"model.num_layers={n}", "workload.activation_checkpointing=false").phases[Phase.FORWARD].peak_bytes or 0
        for n in (layers, layers + 1, layers + 2)
    )

    assert three - two == pytest.approx(two - one, abs=8 * 512)


def test_fewer_live_parameters_lower_the_peak_of_zero3() -> None:
    tight = (f"{ZERO}.stage3_max_live_parameters=1", f"{ZERO}.stage3_prefetch_bucket_size=0", f"{ZERO}.stage3_max_reuse_distance=0")

    assert (small(3, *tight).peak_allocated_bytes or 0) < (small(3).peak_allocated_bytes or 0)


def test_one_rank_gathers_nothing() -> None:
    assert not [item for item in small(3, world=1).peak_items if item.name in {"gathered parameters", "all-gather buckets"}]


def test_accumulating_keeps_gradients_between_micro_steps() -> None:
    once, often = (small(0, f"workload.gradient_accumulation_steps={steps}") for steps in (1, 4))

    assert (often.phases[Phase.FORWARD].peak_bytes or 0) - (once.phases[Phase.FORWARD].peak_bytes or 0) >= 2 * (once.parameters or 0)


def test_overlapping_communication_takes_a_second_bucket() -> None:
    single, double = (small(2, f"{ZERO}.reduce_bucket_size=1000000", f"{ZERO}.overlap_comm={flag}") for flag in ("false", "true"))

    assert (double.phases[Phase.BACKWARD].peak_bytes or 0) - (single.phases[Phase.BACKWARD].peak_bytes or 0) == pytest.approx(2e6, abs=512)


@pytest.mark.parametrize(("recipe", "width"), [("bf16-fp32-master", 2), ("fp32", 4)])
def test_what_is_left_at_the_end_of_backward(recipe: str, width: int) -> None:
    """Stage 0 has every gradient, in blocks of 512 bytes of PyTorch's allocator. Stages 1 and 2
    have no less than those of a rank's partition. Stage 3 has them in a buffer that is there all
    the time."""
    chosen = job(recipe, 0, 4, *SMALL)
    sizes = [spec.numel for spec in inventory(chosen.profile.model)]
    left = {}
    for stage in range(4):
        record = small(stage, recipe=recipe)
        left[stage] = (record.phases[Phase.BACKWARD].end_bytes or 0) - (record.allocated_bytes or 0)

    assert left[0] == sum(-(-width * size // 512) * 512 for size in sizes)
    assert width * sum(sizes) // 4 <= left[1] == left[2] < left[0]
    assert left[3] == 0


def test_the_unfused_fp16_step_copies_every_gradient_to_fp32() -> None:
    """fp16/unfused_optimizer.py, step: beside the gradients in fp16, in blocks of 512 bytes each.
    Fused Adam takes nothing more."""
    fused = (*SMALL[:-1], "optimizer.torch_adam=true", "optimizer.fused=true")
    chosen = job("fp16-fp32-master", 0, 1, *fused)
    record = predict(chosen)
    sizes = [spec.numel for spec in inventory(chosen.profile.model)]
    step = record.phases[Phase.STEP]

    assert (step.peak_bytes or 0) - (record.allocated_bytes or 0) == sum(
        -(-width * size // 512) * 512 for size in sizes for width in (2, 4)
    )
    assert step.end_bytes == record.allocated_bytes


def test_the_fused_fp16_step_has_a_flat_copy_beside_those_of_every_gradient() -> None:
    """fp16/fused_optimizer.py, step: the gradients in fp16, each in fp32, and all of these once
    more in one piece."""
    record = small(0, recipe="fp16-fp32-master", world=1)
    sizes = [spec.numel for spec in inventory(job("fp16-fp32-master", 0, 1, *SMALL).profile.model)]
    pieces = [*(width * size for size in sizes for width in (2, 4)), 4 * sum(sizes)]

    above = (record.phases[Phase.STEP].peak_bytes or 0) - (record.allocated_bytes or 0)
    assert above == sum(-(-piece // 512) * 512 for piece in pieces)


def test_clipping_takes_a_norm_of_every_gradient() -> None:
    """torch/nn/utils clip_grad_norm_ by way of DeepSpeed's utils.py: a scalar each, in a block of
    512 bytes, beside gradients in fp32."""
    fused = (*SMALL[:-1], "optimizer.torch_adam=true", "optimizer.fused=true", "deepspeed.gradient_clipping=1.0")
    chosen = job("fp32", 0, 1, *fused)
    record = predict(chosen)
    sizes = [spec.numel for spec in inventory(chosen.profile.model)]
    gradients = sum(-(-4 * size // 512) * 512 for size in sizes)

    assert (record.phases[Phase.STEP].peak_bytes or 0) - (record.allocated_bytes or 0) == gradients + 512 * len(sizes)


def test_at_least_whole_segments_are_reserved() -> None:
    record = small(2)

    assert record.reserved_bytes is None
    assert (record.reserved_floor_bytes or 0) % 2**21 == 0
    assert 0 <= (record.reserved_floor_bytes or 0) - (record.run_peak_allocated_bytes or 0) < 2**21


def test_zero_init_never_holds_the_whole_model() -> None:
    whole, cut = (small(3, "model.hidden_size=256", f"workload.zero_init={flag}", world=64) for flag in ("false", "true"))

    assert (whole.phases[Phase.INIT].peak_bytes or 0) > 2 * (whole.parameters or 0)
    assert (cut.phases[Phase.INIT].peak_bytes or 0) < (whole.phases[Phase.INIT].peak_bytes or 0)
    assert cut.phases[Phase.STEP] == whole.phases[Phase.STEP]


def test_unfused_kernels_of_torch_take_memory_for_denominators() -> None:
    """At stage 0 in fp32 without clipping nothing else is taken in the step: foreach has one for
    every parameter, 4 bytes an element."""
    fused, foreach, single = (
        predict(job("fp32", 0, 1, *SMALL, "deepspeed.gradient_clipping=0", "optimizer.torch_adam=true", *more))
        .phases[Phase.STEP]
        .peak_bytes
        or 0
        for more in (("optimizer.fused=true",), ("optimizer.foreach=true", "optimizer.fused=false"), ("optimizer.fused=false",))
    )
    parameters = small(1).parameters or 0

    assert foreach - fused == pytest.approx(4 * parameters, rel=0.02)
    assert fused < single < foreach


@pytest.mark.parametrize(
    ("stage", "sets", "reason"),
    [
        (3, (f"{ZERO}.zero_hpz_partition_size=2",), "zero_hpz_partition_size"),
        (3, (f"{ZERO}.memory_efficient_linear=false",), "memory_efficient_linear"),
        (3, (f"{ZERO}.stage3_allgather_sequential=true",), "stage3_allgather_sequential"),
        (1, (f"{ZERO}.use_multi_rank_bucket_allreduce=false",), "use_multi_rank_bucket_allreduce"),
        (2, (f"{ZERO}.use_multi_rank_bucket_allreduce=false",), "use_multi_rank_bucket_allreduce"),
    ],
)
def test_peaks_of_what_was_never_held_against_the_dry_run_stay_null(stage: int, sets: tuple[str, ...], reason: str) -> None:
    record = small(stage, *sets)

    assert record.peak_allocated_bytes is record.reserved_floor_bytes is None
    assert record.allocated_bytes
    assert reason in record.notes[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_lowers_the_peak_of_the_step(stage: int) -> None:
    kept = predict(job("bf16-full", stage, 2, *SMALL))
    offloaded = predict(job("bf16-full", stage, 2, *SMALL, offload=Offload.OPTIMIZER))

    assert (offloaded.phases[Phase.STEP].peak_bytes or 0) < (kept.phases[Phase.STEP].peak_bytes or 0)
