"""The floor of the step time, utilisation and the optimizer's traffic, by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hugging_face import TINY
from jobs import job, profile, small_profile, step_work

from bf16prof.closed_form.predict import predict, with_work
from bf16prof.measuring.utilisation import utilisation
from bf16prof.profiles.gpus import all_gpus, find_gpu, gpu_named
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.profiles.schema import DataTypeSettings
from bf16prof.reports.units import seconds
from bf16prof.reports.work import work_rows
from bf16prof.vocabulary import Device, Offload, Phase, Source

SMALL = 124_439_808
"""Parameters of GPT-2 small."""


@pytest.mark.parametrize(
    ("stage", "recipe", "per_parameter"),
    [
        (0, "fp32", 16 + 12),
        (0, "bf16-fp32-master", 2 + 12 + 12 + 2),
        (2, "bf16-fp32-master", 2 + 12 + 12 + 2),
        (3, "bf16-full", 2 + 6 + 6 + 2),
        (3, "autocast-fp32", 4 + 12 + 12 + 4),
    ],
)
def test_optimizer_reads_and_writes_each_state_once(stage: int, recipe: str, per_parameter: int) -> None:
    """Read: gradient, master, two moments. Written: master, two moments, and the parameter where it
    is another tensor."""
    world = 1 if stage == 0 else 4

    work = step_work(job(profile("gpu-check"), stage, world, recipe))

    assert work.optimizer_bytes == pytest.approx(per_parameter * SMALL / world, rel=1e-4)


def test_bf16_optimizers_flat_buffer_knows_no_settings_of_zero() -> None:
    """bf16_optimizer.py flattens without `parameter_alignment`: 6,535 parameters, padded to 2 * 4
    ranks, and a quarter of them a rank.

    Per element: gradient, master parameter and both moments, each of four bytes; stages 1 and 2
    align every parameter to 16 bytes.
    """
    zero = small_profile(parameter_alignment=True)
    bf16 = zero.model_copy(
        update={"deepspeed": zero.deepspeed.model_copy(update={"data_types": DataTypeSettings(grad_accum_dtype="fp32")})}
    )

    assert step_work(job(bf16, 1, 4)).optimizer_read_bytes == 16 * 1634
    assert step_work(job(zero, 1, 4)).optimizer_read_bytes > 14 * 1634


def test_floor_of_one_gpu_is_compute_and_optimizer() -> None:
    """GPT-2 small, 2 x 512 tokens on an H100: operations over 989.5 TFLOP/s, 28 bytes per parameter
    over 3.35 TB/s, nothing sent."""
    record = predict(job(profile("gpu-check"), 0, 1))

    assert record.work is not None
    operations = 6 * 1024 * (SMALL - 1024 * 768 - 121_344) + 12 * 12 * 768 * 512 * 1024
    assert record.work.model_flops == operations
    assert record.step_time_floor_s == pytest.approx(operations / 989.5e12 + 28 * SMALL / 3.35e12)
    assert record.step_time_s is None, "a floor is no prediction"


def test_communication_hides_behind_compute_only_with_overlap() -> None:
    key = "deepspeed__zero_optimization__overlap_comm"
    apart, together = (step_work(job(profile("gpu-check", **{key: overlap}), 2, 8)) for overlap in (False, True))

    assert apart.floor_s["communication"] > together.floor_s["communication"]
    assert together.floor_s["communication"] >= together.floor_s["optimizer"]  # the gather after the step never hides
    assert apart.hidden_s == {}
    assert together.floor_s["communication"] + together.hidden_s["communication"] == pytest.approx(apart.floor_s["communication"])


def test_what_hides_is_said_beside_what_does_not() -> None:
    """150 GiB sent in no time at all: they travel while the GPU computes."""
    record = predict(job(profile("llama3-8b"), 3, 8))
    assert record.work is not None

    (said,) = (of_it for name, _, of_it in work_rows(record) if name.startswith("step time: floor"))

    hidden = record.work.hidden_s["communication"]
    sent = sum(t.sent_bytes for t in record.work.transfers if t.phase is not Phase.STEP)
    assert hidden == pytest.approx(sent / 450e9), "an H100's NVLink in one direction"
    assert f"({seconds(hidden)} more behind compute)" in said


def test_fp32_is_held_against_the_fp32_peak() -> None:
    full, half = (step_work(job(profile("gpu-check"), 0, 1, recipe)) for recipe in ("fp32", "bf16-fp32-master"))

    assert full.floor_s["compute"] / half.floor_s["compute"] == pytest.approx(989.5 / 66.9)
    assert step_work(job(profile("gpu-check"), 0, 1, "autocast-fp32")).floor_s["compute"] == half.floor_s["compute"]


def test_offloaded_optimizer_has_no_floor_but_bytes_on_the_link() -> None:
    """bf16 gradients go down while backward runs, parameters come up when the optimizer is done:
    over PCIe 5.0 x16 in one direction."""
    work = step_work(job(profile("gpu-check"), 2, 1, offload=Offload.OPTIMIZER))

    assert work.floor_s["optimizer"] == 0
    assert work.host_link_bytes == pytest.approx(4 * SMALL, rel=1e-6)
    assert work.floor_s["host link"] == pytest.approx(2 * 2 * SMALL / 64e9 - work.floor_s["compute"]), "what goes down hides behind compute"
    assert work.hidden_s == {"host link": pytest.approx(work.floor_s["compute"])}


@pytest.mark.parametrize(("steps", "moved"), [(1, 2), (3, 6)])
def test_offloaded_parameters_come_up_whenever_they_are_gathered(steps: int, moved: int) -> None:
    """Once in forward and once in backward of every micro-step, where nothing stays; the rank's own
    half of every parameter."""
    zero = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    changes = {f"deepspeed__zero_optimization__{key}": value for key, value in zero.items()}
    settings = profile("llama3-8b", workload__gradient_accumulation_steps=steps, workload__activation_checkpointing=False, **changes)
    work = step_work(job(settings, 3, 2, offload=Offload.OPTIMIZER_AND_PARAMETERS))

    gradients = 2 * steps * 8_030_261_248 / 2
    assert work.host_link_bytes - gradients == pytest.approx(2 * moved * 8_030_261_248 / 2, rel=1e-3)


def test_what_leaves_the_node_is_charged_by_the_host_link() -> None:
    """Eight nodes of one GPU send everything over PCIe, one node of eight over NVLink, which is 900
    / 128 times as fast."""
    found = job(profile("gpu-check"), 2, 8)
    inside, outside = (step_work(found, per_node).floor_s["communication"] for per_node in (8, 1))

    assert outside / inside == pytest.approx(900 / 128)


def test_tf32_is_named_where_it_would_lower_the_floor() -> None:
    """624 TFLOP/s with sparsity, and so 156 in TF32, against 19.5 outside the tensor cores: NVIDIA
    A100 datasheet."""
    record = predict(dataclasses.replace(job(profile("gpu-check"), 0, 1, "fp32"), gpu=find_gpu("a100-80gb")))

    assert record.work is not None
    assert record.notes[-1].endswith(f"allow_tf32 would lower its compute to {record.work.floor_s['compute'] * 19.5 / 156:.3g} s")
    assert predict(job(profile("gpu-check"), 0, 1)).notes == ()


def test_dry_runs_take_the_work_of_the_estimate() -> None:
    predicted = predict(job(profile("gpu-check"), 0, 1))
    dry = dataclasses.replace(predicted, source=Source.SIMULATE, work=None, step_time_floor_s=None)
    other = dataclasses.replace(dry, case=dataclasses.replace(dry.case, zero_stage=1))

    found = with_work([dry, other, predicted])

    assert [record.work for record in found] == [predicted.work, None, predicted.work]
    assert found[0].step_time_floor_s == predicted.step_time_floor_s


@pytest.mark.parametrize(("switch", "value"), [("memory_efficient_linear", False), ("allgather_sequential", True)])
def test_jobs_without_peaks_have_work(switch: str, value: bool) -> None:
    settings = profile("gpu-check", **{f"deepspeed__zero_optimization__{switch}": value})
    record = predict(job(settings, 3, 4))

    assert record.peak_allocated_bytes is None
    assert record.work is not None
    assert record.work.transfers


def test_models_without_a_tape_have_none_and_say_so() -> None:
    model = HuggingFaceSettings(hf_config={"model_type": "llama", **TINY["llama"], "hidden_act": "mish"})
    record = predict(job(profile("gpu-check", workload__sequence_length=32).model_copy(update={"model": model}), 3, 4))

    assert (record.work, record.step_time_floor_s) == (None, None)
    assert record.notes[-1].startswith("no work of a step in closed form: ")


def test_cpu_ranks_have_no_floor() -> None:
    work = step_work(job(profile("cpu-demo"), 2, 2, device=Device.CPU))

    assert work.step_time_floor_s is None
    assert utilisation(work, None, 1.0) == (None, None)


def test_utilisation_is_operations_over_the_peak() -> None:
    work = step_work(job(profile("gpu-check", workload__activation_checkpointing=True), 0, 1))

    mfu, hfu = utilisation(work, find_gpu("h100-80gb"), work.model_flops / 989.5e12 / 0.4)

    assert mfu == pytest.approx(0.4)
    assert hfu is not None
    assert hfu / 0.4 == pytest.approx(1 + work.recomputed_flops / work.model_flops)


def test_gpus_are_found_by_torchs_names() -> None:
    assert {gpu_named(gpu.torch_name) for gpu in all_gpus().values()} == set(all_gpus().values())
    assert gpu_named("NVIDIA H100 80GB HBM3") == find_gpu("h100-80gb")
    assert gpu_named("NVIDIA V100") is None
    assert gpu_named("") is None
    assert gpu_named(None) is None


@pytest.mark.parametrize(
    ("id_", "multiprocessors", "lanes", "boost_ghz"),
    [
        ("a100-80gb", 108, 64, 1.41),
        ("h100-80gb", 132, 128, 1.98),
        ("h100-pcie-80gb", 114, 128, 1.755),
        ("h100-nvl-94gb", 132, 128, 1.785),
        ("b200-180gb", 148, 128, 1.965),
        ("l40s-48gb", 142, 128, 2.52),
        ("l4-24gb", 58, 128, 2.04),
        ("a10-24gb", 72, 128, 1.695),
        ("a6000-48gb", 84, 128, 1.80),
        ("rtx-5090-32gb", 170, 128, 2.407),
        ("rtx-4090-24gb", 128, 128, 2.52),
        ("rtx-3090-24gb", 82, 128, 1.695),
    ],
)
def test_fp32_arithmetic_agrees_with_the_clock(id_: str, multiprocessors: int, lanes: int, boost_ghz: float) -> None:
    """Multiprocessors x fp32 lanes x 2 x boost clock, from NVIDIA's architecture whitepapers."""
    assert find_gpu(id_).fp32_tflops == pytest.approx(multiprocessors * lanes * 2 * boost_ghz / 1e3, rel=0.015)
