"""The floor of the step time, utilisation and the optimizer's traffic, by hand."""

from __future__ import annotations

import pytest
from jobs import job, profile

from bf16prof.estimate.predict import predict
from bf16prof.estimate.roofline import step_work
from bf16prof.measure.utilisation import utilisation
from bf16prof.profiles.gpus import all_gpus, find_gpu, gpu_named
from bf16prof.records import Device, Offload

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
    """Read: gradient, master, two moments. Written: master, two moments, and the parameter where it is another tensor."""
    world = 1 if stage == 0 else 4

    work = step_work(job(profile("gpu-check"), stage, world, recipe))

    assert work.optimizer_bytes == pytest.approx(per_parameter * SMALL / world, rel=1e-4)


def test_floor_of_one_gpu_is_compute_and_optimizer() -> None:
    """GPT-2 small, 2 x 512 tokens on an H100: operations over 989.5 TFLOP/s, 28 bytes per parameter over 3.35 TB/s, nothing sent."""
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


def test_fp32_is_held_against_the_fp32_peak() -> None:
    full, half = (step_work(job(profile("gpu-check"), 0, 1, recipe)) for recipe in ("fp32", "bf16-fp32-master"))

    assert full.floor_s["compute"] / half.floor_s["compute"] == pytest.approx(989.5 / 66.9)
    assert step_work(job(profile("gpu-check"), 0, 1, "autocast-fp32")).floor_s["compute"] == half.floor_s["compute"]


def test_offloaded_optimizer_has_no_floor_but_bytes_on_the_link() -> None:
    work = step_work(job(profile("gpu-check"), 2, 1, offload=Offload.OPTIMIZER))

    assert work.floor_s["optimizer"] == 0
    assert work.host_link_bytes == pytest.approx(4 * SMALL, rel=1e-6)


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
