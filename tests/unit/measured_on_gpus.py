"""Measurements of real GPUs from `tests/data`, and what the simulated GPU gives for them, in
processes of their own."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
KERNELS: dict[str, Any] = json.loads((DATA / "gpu-kernels.json").read_text(encoding="utf-8"))
STEPS: dict[str, Any] = json.loads((DATA / "gpu-steps.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Kernel:
    """One row of the benchmark: what was measured in MiB (float32 digits), and by how many bytes
    the simulated GPU differs from it."""

    table: dict[str, Any]
    peak_mib: float
    difference: int
    why: str
    is_slow: bool

    @property
    def label(self) -> str:
        """Its name."""
        dtype = str(self.table["shape"].get("dtype", "")).removeprefix("torch.")
        return "{kernel} {implementation} {mode} {variable}={x} {gpu} ".format(**self.table) + dtype


def kernels() -> list[Kernel]:
    """Every row of the data file."""
    found = []
    for series in KERNELS["series"]:
        fixed = {key: series[key] for key in ("kernel", "implementation", "mode", "variable", "shape", "gpu")}
        for x, peak in series["peaks_mib"].items():
            difference = series.get("differences", {}).get(x, 0)
            is_slow = int(x) >= series.get("slow_from", sys.maxsize)
            found.append(Kernel({**fixed, "x": int(x)}, peak, difference, series.get("why", ""), is_slow))
    return found


def answer(module: str, asked: Any) -> list[int]:
    """What `python -m bf16prof.check.MODULE` answers."""
    command = [sys.executable, "-m", f"bf16prof.check.{module}"]
    run = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    peaks: list[int] = json.loads(run.stdout.strip().splitlines()[-1])
    return peaks


@functools.cache
def simulated_kernels(*, slow: bool = False) -> dict[str, int]:
    """The peak of every row (or of every row that is not slow) on its simulated GPU in bytes, by
    label."""
    rows = [kernel for kernel in kernels() if slow or not kernel.is_slow]
    return dict(zip([row.label for row in rows], answer("rows", [row.table for row in rows]), strict=True))


@functools.cache
def simulated_steps() -> list[int]:
    """The peaks of the whole steps in bytes."""
    keys = ("model", "tokens", "checkpointing", "autocast", "attention")
    steps = [{key: step[key] for key in keys if key in step} for step in STEPS["steps"]]
    return answer("steps", {"gpu": STEPS["gpu"], "steps": steps})
