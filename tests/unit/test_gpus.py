"""The GPU table: its schema, and its figures against facts that are not in it (SM counts, clocks, bus widths)."""

from __future__ import annotations

import re

import pytest

from bf16prof.errors import InputError
from bf16prof.profiles.gpus import all_gpus, find_gpu

GPUS = sorted(all_gpus())


@pytest.mark.parametrize("id_", GPUS)
def test_row_is_complete_and_positive(id_: str) -> None:
    gpu = find_gpu(id_)

    assert gpu.id == id_
    assert gpu.memory_bytes > 0
    assert isinstance(gpu.memory_bytes, int)
    assert min(gpu.bf16_tflops, gpu.hbm_gb_per_s, gpu.link_gb_per_s, gpu.host_gb_per_s) > 0
    assert gpu.fp32_tflops <= 1.01 * gpu.tf32_tflops, "tensor cores are no slower"
    assert gpu.link_gb_per_s < gpu.hbm_gb_per_s
    assert gpu.compute_capability >= (8, 0), "the first NVIDIA architecture with bf16 tensor cores is 8.0"
    assert "Memory" in gpu.source


@pytest.mark.parametrize("id_", GPUS)
def test_usable_memory_is_a_little_less_than_the_size_on_the_box(id_: str) -> None:
    match = re.search(r"-(\d+)gb$", id_)
    assert match is not None

    assert 0.9 < find_gpu(id_).memory_bytes / (int(match[1]) * 2**30) < 1


def test_names_are_unique() -> None:
    assert len({gpu.name for gpu in all_gpus().values()}) == len(GPUS)


@pytest.mark.parametrize(
    ("id_", "multiprocessors", "flop_per_clock", "boost_ghz"),
    [
        ("a100-80gb", 108, 2048, 1.41),
        ("h100-80gb", 132, 4096, 1.83),
        ("h100-pcie-80gb", 114, 4096, 1.62),
        ("l40s-48gb", 142, 1024, 2.52),
        ("l4-24gb", 58, 1024, 2.04),
        ("a10-24gb", 72, 1024, 1.695),
        ("a6000-48gb", 84, 1024, 1.80),
        ("rtx-4090-24gb", 128, 512, 2.52),
        ("rtx-3090-24gb", 82, 512, 1.695),
    ],
)
def test_arithmetic_is_dense_and_agrees_with_the_clock(id_: str, multiprocessors: int, flop_per_clock: int, boost_ghz: float) -> None:
    """Multiprocessors x dense bf16 FLOP per clock and multiprocessor x boost clock, from NVIDIA's architecture whitepapers."""
    assert find_gpu(id_).bf16_tflops == pytest.approx(multiprocessors * flop_per_clock * boost_ghz / 1e3, rel=0.015)


@pytest.mark.parametrize(
    ("id_", "bus_bits", "gbit_per_s_per_pin"),
    [
        ("a100-40gb", 5120, 2.43),
        ("a100-80gb", 5120, 3.186),
        ("l40s-48gb", 384, 18),
        ("l4-24gb", 192, 12.5),
        ("a10-24gb", 384, 12.5),
        ("a6000-48gb", 384, 16),
        ("rtx-5090-32gb", 512, 28),
        ("rtx-4090-24gb", 384, 21),
        ("rtx-3090-24gb", 384, 19.5),
    ],
)
def test_bandwidth_agrees_with_the_memory_bus(id_: str, bus_bits: int, gbit_per_s_per_pin: float) -> None:
    assert find_gpu(id_).hbm_gb_per_s == pytest.approx(bus_bits * gbit_per_s_per_pin / 8, rel=0.005)


def test_unknown_gpu_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown GPU 'v100-32gb'") as caught:
        find_gpu("v100-32gb")

    assert "h100-80gb" in caught.value.hint
