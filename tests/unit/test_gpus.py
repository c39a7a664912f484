"""The GPU table: its schema, and its figures against facts that are not in it (SM counts, clocks,
bus widths)."""

from __future__ import annotations

import re

import pytest

from bf16prof.engine.workspace import cublas_workspace_bytes
from bf16prof.errors import InputError
from bf16prof.profiles.gpus import all_gpus, find_gpu, gpu_named

GPUS = sorted(all_gpus())


@pytest.mark.parametrize("id_", GPUS)
def test_row_is_complete_and_positive(id_: str) -> None:
    gpu = find_gpu(id_)

    assert gpu.id == id_
    assert gpu.memory_bytes > 0
    assert isinstance(gpu.memory_bytes, int)
    assert min(gpu.bf16_tflops, gpu.fp32_tflops, gpu.hbm_gb_per_s, gpu.link_gb_per_s, gpu.host_gb_per_s, gpu.multiprocessors) > 0
    assert gpu.fp32_tflops <= 1.01 * gpu.tf32_tflops, "tensor cores are no slower"
    assert gpu.link_gb_per_s < gpu.hbm_gb_per_s
    assert "Memory" in gpu.source
    assert gpu.torch_name


@pytest.mark.parametrize("id_", GPUS)
def test_what_bf16_runs_on_is_said(id_: str) -> None:
    """NVIDIA's first architecture with bf16 tensor cores is 8.0; before it fp16 alone has them, and
    bf16 is multiplied in fp32."""
    gpu = find_gpu(id_)

    assert (gpu.compute_capability < (8, 0)) == (gpu.bf16_tflops == gpu.fp32_tflops) == bool(gpu.fp16_tflops)
    assert bool(list(gpu.caveats())) == (gpu.compute_capability < (8, 0) or bool(gpu.architecture))
    assert gpu.peak_flops("fp16") == 1e12 * (gpu.fp16_tflops or gpu.bf16_tflops)
    assert all(id_ in caveat and "peak" in caveat for caveat in gpu.caveats())


@pytest.mark.parametrize("id_", GPUS)
def test_usable_memory_is_a_little_less_than_the_size_on_the_box(id_: str) -> None:
    match = re.search(r"-(\d+)gb$", id_)
    assert match is not None

    assert 0.9 < find_gpu(id_).memory_bytes / (int(match[1]) * 2**30) < 1


def test_names_are_unique() -> None:
    assert len({gpu.name for gpu in all_gpus().values()}) == len(GPUS)


CORES = {
    "a100-80gb": (6912, 64), "a800-80gb": (6912, 64), "a30-24gb": (3584, 64), "h100-80gb": (16896, 128), "h100-pcie-80gb": (14592, 128),
    "h800-80gb": (16896, 128), "h200-141gb": (16896, 128), "gh200-96gb": (16896, 128), "h100-nvl-94gb": (16896, 128),
    "l40s-48gb": (18176, 128), "l4-24gb": (7424, 128), "a10-24gb": (9216, 128), "a40-48gb": (10752, 128), "a6000-48gb": (10752, 128),
    "rtx-5090-32gb": (21760, 128), "rtx-4090-24gb": (16384, 128), "rtx-3090-24gb": (10496, 128), "v100-16gb": (5120, 64),
    "v100-32gb": (5120, 64), "t4-16gb": (2560, 64), "rtx-2080-ti-11gb": (4352, 64), "titan-rtx-24gb": (4608, 64),
    "mi250x-64gb": (14080 // 2, 64), "mi300x-192gb": (19456, 64),
}  # fmt: skip
"""CUDA cores (of AMD: stream processors; MI250X: of one of two GCDs) of the datasheets, and how
many a multiprocessor has."""


@pytest.mark.parametrize("id_", CORES)
def test_multiprocessors_are_the_cores_of_the_datasheet_over_those_of_one(id_: str) -> None:
    cores, each = CORES[id_]

    assert find_gpu(id_).multiprocessors * each == cores


@pytest.mark.parametrize(
    ("id_", "flop_per_clock", "boost_ghz"),
    [
        ("a100-80gb", 2048, 1.41),
        ("a800-80gb", 2048, 1.41),
        ("a30-24gb", 2048, 1.44),
        ("h100-80gb", 4096, 1.83),
        ("h800-80gb", 4096, 1.83),
        ("h100-pcie-80gb", 4096, 1.62),
        ("l40s-48gb", 1024, 2.52),
        ("l4-24gb", 1024, 2.04),
        ("a10-24gb", 1024, 1.695),
        ("a40-48gb", 1024, 1.74),
        ("a6000-48gb", 1024, 1.80),
        ("rtx-4090-24gb", 512, 2.52),
        ("rtx-3090-24gb", 512, 1.695),
        ("v100-32gb", 1024, 1.53),
        ("t4-16gb", 1024, 1.59),
        ("rtx-2080-ti-11gb", 512, 1.545),
        ("titan-rtx-24gb", 1024, 1.77),
        ("mi250x-64gb", 1024, 1.7),
        ("mi300x-192gb", 2048, 2.1),
    ],
)
def test_arithmetic_is_dense_and_agrees_with_the_clock(id_: str, flop_per_clock: int, boost_ghz: float) -> None:
    """Multiprocessors x dense FLOP in fp16 per clock and multiprocessor x boost clock, from the
    vendors' architecture whitepapers."""
    gpu = find_gpu(id_)

    assert (gpu.fp16_tflops or gpu.bf16_tflops) == pytest.approx(gpu.multiprocessors * flop_per_clock * boost_ghz / 1e3, rel=0.015)


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
        ("a30-24gb", 3072, 2.43),
        ("a40-48gb", 384, 14.5),
        ("v100-16gb", 4096, 1.752),
        ("t4-16gb", 256, 10),
        ("rtx-2080-ti-11gb", 352, 14),
        ("titan-rtx-24gb", 384, 14),
        ("mi250x-64gb", 4096, 3.2),
        ("mi300x-192gb", 8192, 5.2),
    ],
)
def test_bandwidth_agrees_with_the_memory_bus(id_: str, bus_bits: int, gbit_per_s_per_pin: float) -> None:
    assert find_gpu(id_).hbm_gb_per_s == pytest.approx(bus_bits * gbit_per_s_per_pin / 8, rel=0.005)


TYPED = {
    "h100": "h100-80gb", "H100": "h100-80gb", "H100 SXM": "h100-80gb", "h100-sxm5": "h100-80gb", "NVIDIA H100 80GB HBM3": "h100-80gb",
    "H100 PCIe": "h100-pcie-80gb", "h100_nvl": "h100-nvl-94gb", "a100-80": "a100-80gb", "A100-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb", "A100 40G": "a100-40gb", "A100 PCIe": "a100-pcie-80gb", "4090": "rtx-4090-24gb",
    "rtx4090": "rtx-4090-24gb", "GeForce RTX 3090": "rtx-3090-24gb", "2080ti": "rtx-2080-ti-11gb", "2080 Ti": "rtx-2080-ti-11gb",
    "TITAN RTX": "titan-rtx-24gb", "Tesla V100-SXM2-16GB": "v100-16gb", "v100 32": "v100-32gb", "t4": "t4-16gb", "Tesla T4": "t4-16gb",
    "a10": "a10-24gb", "A10G": "a10g-24gb", "a30": "a30-24gb", "a40": "a40-48gb", "L4": "l4-24gb", "l40s": "l40s-48gb",
    "a800": "a800-80gb", "h800": "h800-80gb", "h20": "h20-96gb", "H200": "h200-141gb", "b200": "b200-180gb", "b300": "b300-288gb",
    "gh200": "gh200-96gb", "MI250X": "mi250x-64gb", "AMD Instinct MI300X": "mi300x-192gb", "a6000": "a6000-48gb",
}  # fmt: skip
"""What people write, and what they mean."""


@pytest.mark.parametrize("typed", TYPED)
def test_a_gpu_is_found_by_what_people_call_it(typed: str) -> None:
    assert find_gpu(typed).id == TYPED[typed]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("a100", {"a100-40gb", "a100-80gb", "a100-pcie-80gb"}),
        ("V100", {"v100-16gb", "v100-32gb"}),
        ("A100 SXM", {"a100-40gb", "a100-80gb"}),
    ],
)
def test_what_may_be_several_gpus_is_asked_back(typed: str, offered: set[str]) -> None:
    with pytest.raises(InputError, match=f"GPU '{typed}' may be any of {len(offered)}") as caught:
        find_gpu(typed)

    assert set(caught.value.hint.removeprefix("did you mean ").removesuffix("?").split(", ")) == offered


@pytest.mark.parametrize(
    ("typed", "offered"), [("l40", "l40s-48gb"), ("3090ti", "rtx-3090-24gb"), ("h101", "h100-80gb"), ("mi300", "mi300x-192gb")]
)
def test_an_unknown_gpu_is_answered_with_those_that_are_near(typed: str, offered: str) -> None:
    with pytest.raises(InputError, match=f"unknown GPU '{typed}'") as caught:
        find_gpu(typed)

    assert offered in caught.value.hint.partition("?")[0]
    assert "as 80GiB" in caught.value.hint


def test_a_gpu_that_is_like_none_lists_them_all() -> None:
    with pytest.raises(InputError, match="unknown GPU") as caught:
        find_gpu("abacus")

    assert all(id_ in caught.value.hint for id_ in GPUS)


def test_a_bare_name_stands_for_a_gpu_whose_memory_no_other_of_the_family_undercuts() -> None:
    """So that what fits it fits the others of that name."""
    for gpu in all_gpus().values():
        for alias in gpu.aliases:
            alike = [other for other in all_gpus().values() if alias.casefold() in other.name.casefold().split() and " " not in alias]
            assert all(other.memory_bytes > 0.99 * gpu.memory_bytes for other in alike), alias


@pytest.mark.parametrize("id_", GPUS)
def test_every_name_finds_its_own_row(id_: str) -> None:
    gpu = all_gpus()[id_]

    assert {find_gpu(name) for name in (gpu.id, gpu.id.upper(), gpu.torch_name, *gpu.aliases)} == {gpu}
    assert gpu_named(gpu.torch_name) == gpu


@pytest.mark.parametrize(
    ("typed", "size", "id_"),
    [
        ("80GiB", 80 * 2**30, "80GiB"),
        ("80GB", 80 * 10**9, "80GB"),
        ("24g", 24 * 2**30, "24GiB"),
        ("16.5 gib", 16.5 * 2**30, "16.5GiB"),
        ("11264MiB", 11 * 2**30, "11264MiB"),
    ],
)
def test_any_other_gpu_is_named_by_its_memory(typed: str, size: float, id_: str) -> None:
    gpu = find_gpu(typed)

    assert (gpu.memory_bytes, gpu.id) == (size, id_)
    assert (gpu.compute_capability, gpu.multiprocessors, gpu.peak_flops("bf16"), gpu.peak_flops("fp32")) == ((8, 0), 0, None, None)
    assert gpu_named(gpu.id) == gpu, "a record's GPU is found again"
    (caveat,) = gpu.caveats()
    assert f"{int(size):,}" in caveat
    assert "compute capability 8.0" in caveat
    assert "no floor" in caveat


@pytest.mark.parametrize("typed", ["0g", "0GiB", "1MiB", "999999GiB"])
def test_a_memory_that_no_gpu_has_is_refused(typed: str) -> None:
    with pytest.raises(InputError, match="no GPU has so much memory, or so little"):
        find_gpu(typed)


@pytest.mark.parametrize(
    ("id_", "mib"),
    [
        ("v100-32gb", 8.125), ("t4-16gb", 8.125), ("a100-80gb", 8.125), ("rtx-4090-24gb", 8.125), ("h100-80gb", 32), ("h20-96gb", 32),
        ("b300-288gb", 32), ("rtx-5090-32gb", 32), ("mi250x-64gb", 32), ("mi300x-192gb", 128),
    ],
)  # fmt: skip
def test_the_workspace_of_matrix_products_is_pytorchs_default(id_: str, mib: float) -> None:
    """`parseChosenWorkspaceSize` of aten/src/ATen/cuda/CublasHandlePool.cpp, in its main branch of
    summer 2026."""
    assert cublas_workspace_bytes(find_gpu(id_)) == mib * 2**20
