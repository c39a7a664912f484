"""The script of the GPU check: its table, and what it does where a case fails or no time is left;
the folder for a node without network."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from bf16prof.check.__main__ import CheckRun, Clock, Compared, cases, measured, write

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_table_says_measured_predicted_and_the_error(tmp_path: Path) -> None:
    write([Compared("zero2", "allocated", 1000, 1010), Compared("offload", "-", "failed: no such file")], tmp_path / "table.md")

    assert (tmp_path / "table.md").read_text() == (
        "| case | quantity | measured | predicted | error |\n| --- | --- | ---: | ---: | ---: |\n"
        "| zero2 | allocated | 1,000 | 1,010 | +1.0000% |\n| offload | - | failed: no such file |  |  |\n"
    )


def test_a_case_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()

    (line,) = measured(CheckRun("unknown", ("--profile", "no-such-profile"), {}), Clock(2))

    assert str(line.measured).startswith("failed: bf16prof: ")
    assert "no-such-profile" in str(line.measured)


def test_a_gpu_is_asked_for_both_sizes_both_segments_and_offloading() -> None:
    names = {case.name for case in cases(cpu=False)}

    assert {"ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "offload", "expandable segments"} <= names
    assert sum("checkpointing" in name for name in names) == 4


def test_the_bundle_holds_the_wheels_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored, in one archive; pip checks what is in a wheel by hashes of its files, which stay."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pack = importlib.import_module("bundle").pack
    wheels, name = tmp_path / "made", "a-1-py3-none-any.whl"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("a/__init__.py", "x = 1\n" * 1000)

    pack(wheels, tmp_path / "wheels.tar.xz")

    with tarfile.open(tmp_path / "wheels.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with zipfile.ZipFile(tmp_path / "wheels" / name) as wheel:
        (info,) = wheel.infolist()
        assert (info.compress_type, wheel.read(info)) == (zipfile.ZIP_STORED, b"x = 1\n" * 1000)


def test_the_script_sees_every_folder_that_its_python_sees(tmp_path: Path) -> None:
    """torch's libraries may lie in another folder than torch: `libcudnn.so.9` was not found in such
    an environment."""
    script = (BENCHMARKS / "bundle" / "gpu-check.sh").read_text(encoding="utf-8")
    (code,) = re.findall(r"-c '(import os, sys, sysconfig\n.*?)' >", script, re.DOTALL)
    (tmp_path / "nvidia").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )

    told = run.stdout.splitlines()
    assert str(tmp_path) in told
    assert sysconfig.get_path("purelib") in told
    assert sysconfig.get_path("stdlib") not in told
