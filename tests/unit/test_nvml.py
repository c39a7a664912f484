"""The NVML sampler through the real `pynvml`, over a stub of NVIDIA's library compiled here
(`nvml_stub.c`); a process for each case."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MIB = 2**20
COMPILER = next((path for path in map(shutil.which, ("gcc", "cc", "clang")) if path), None)
SAMPLE = """
import dataclasses, json, time
from bf16prof.measuring.probes.nvml import NvmlSampler
with NvmlSampler({device!r}, interval_s=0.002) as sampler:
    deadline = time.monotonic() + 20
    while sampler.reason is None and sampler.samples < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
summary = sampler.summary()
print(json.dumps({{"summary": summary and dataclasses.asdict(summary), "reason": sampler.reason}}))
"""
AVAILABLE = "import json; from bf16prof.measuring.probes import nvml; print(json.dumps(nvml.available()))"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the stub as `libnvidia-ml.so.1`."""
    if COMPILER is None:
        pytest.skip("needs a C compiler to build the stub of libnvidia-ml.so.1")
    folder = tmp_path_factory.mktemp("nvml")
    command = [COMPILER, "-Wall", "-Werror", "-shared", "-fPIC", str(HERE / "nvml_stub.c"), "-o", str(folder / "libnvidia-ml.so.1")]
    subprocess.run(command, check=True, timeout=60)
    return folder


def run(code: str, library: Path, **stub: str) -> Any:
    """The JSON that `code` prints in a fresh interpreter in which pynvml loads its library from
    that folder."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), **{f"STUB_{name.upper()}": value for name, value in stub.items()}}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def sample(library: Path, device: int | str = 0, **stub: str) -> dict[str, Any]:
    """The summary of five or more samples of a device."""
    return dict(run(SAMPLE.format(device=device), library, **stub)["summary"])


def test_the_highest_sample_is_the_peak_and_nvml_is_shut_down(library: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    summary = sample(library, used="100,100,900,300", process="50,700,60", log=str(log))

    assert summary["device_name"] == "Stub GPU 0"
    assert summary["total_bytes"] == 1000 * MIB
    assert summary["peak_device_bytes"] == 900 * MIB
    assert summary["peak_process_bytes"] == 700 * MIB, "this process only, not the other one in the list"
    assert summary["mean_utilisation"] == pytest.approx(0.40)
    assert summary["mean_power_w"] == pytest.approx(250.5)
    assert summary["samples"] >= 6, "one more when it ends"
    assert log.read_text().split() == ["init", "shutdown"]


def test_what_a_gpu_cannot_tell_is_none(library: Path) -> None:
    summary = sample(library, fail="utilisation:3,power:3,memory:3,processes:3")

    assert summary.pop("samples") >= 5
    assert summary.pop("device_name") == "Stub GPU 0"
    assert set(summary.values()) == {None}


def test_a_gpu_that_is_lost_while_sampling_is_none_not_a_crash(library: Path) -> None:
    assert sample(library, fail="memory:15,processes:15")["peak_device_bytes"] is None


@pytest.mark.parametrize("stub", [{"process": "na"}, {"pid": "4242"}, {"pid": "0"}])
def test_process_memory_that_nvml_does_not_know_is_none(library: Path, stub: dict[str, str]) -> None:
    summary = sample(library, **stub)

    assert summary["peak_process_bytes"] is None
    assert summary["peak_device_bytes"] == 100 * MIB


def test_a_driver_without_version_2_of_memory_info(library: Path) -> None:
    assert sample(library, fail="memory2:13")["peak_device_bytes"] == 110 * MIB, "version 1 counts the driver's own 10 MiB as used"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (1, "Stub GPU 1"),
        ("GPU-bbbbbbbb-0000-0000-0000-000000000000", "Stub GPU 1"),
        ("bbbbbbbb-0000-0000-0000-000000000000", "Stub GPU 1"),
        ("MIG-cccccccc-0000-0000-0000-000000000000", "Stub GPU 2"),
        ("cccccccc-0000-0000-0000-000000000000", "Stub GPU 2"),
        ("00000000:2D:00.0", "Stub GPU 1"),
    ],
)
def test_devices_are_found_by_index_uuid_mig_uuid_and_pci_bus(library: Path, device: int | str, name: str) -> None:
    assert sample(library, device)["device_name"] == name


@pytest.mark.parametrize(("device", "reason"), [(7, "Invalid Argument"), ("GPU-dddddddd", "Not Found"), ("dddddddd", "Not Found")])
def test_an_unknown_device_is_a_reason_and_nvml_is_shut_down(library: Path, tmp_path: Path, device: int | str, reason: str) -> None:
    log = tmp_path / "log"

    answer = run(SAMPLE.format(device=device), library, log=str(log))

    assert answer == {"summary": None, "reason": f"NVML: {reason}"}
    assert log.read_text().split() == ["init", "shutdown"]


def test_an_exception_in_the_job_passes_and_nvml_is_shut_down(library: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = """
from bf16prof.measuring.probes.nvml import NvmlSampler
try:
    with NvmlSampler(0): raise KeyError("job")
except KeyError as error: print('"' + error.args[0] + '"')
"""
    assert run(code, library, log=str(log)) == "job"
    assert log.read_text().split() == ["init", "shutdown"]


@pytest.mark.parametrize(
    ("stub", "reason"),
    [
        ({}, None),
        ({"init": "9"}, "NVML: Driver Not Loaded"),
        ({"count": "0"}, "NVML finds no GPU"),
        ({"init": "999"}, "NVML: Unknown Error"),
    ],
)
def test_available_gives_the_reason(library: Path, stub: dict[str, str], reason: str | None) -> None:
    assert run(AVAILABLE, library, **stub) == reason


def test_no_library_is_normal(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")

    reason = run(AVAILABLE, tmp_path)

    assert reason.startswith("libnvidia-ml.so.1 not found")
    assert run(SAMPLE.format(device=0), tmp_path) == {"summary": None, "reason": reason}


def test_gpus_and_driver_are_listed(library: Path, tmp_path: Path) -> None:
    code = """
import dataclasses, json
from bf16prof.measuring.probes import nvml
print(json.dumps([[dataclasses.asdict(gpu) for gpu in nvml.list_gpus()], nvml.driver_version()]))
"""
    gpus, driver = run(code, library)
    assert [(gpu["index"], gpu["name"], gpu["total_bytes"]) for gpu in gpus] == [
        (0, "Stub GPU 0", 1000 * MIB),
        (1, "Stub GPU 1", 1000 * MIB),
    ]
    assert gpus[1]["uuid"].startswith("GPU-bbbbbbbb")
    assert driver == "570.86.10"

    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    assert run(code, tmp_path) == [[], None]
