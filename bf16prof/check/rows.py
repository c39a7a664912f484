"""Rows of Liger-Kernel's benchmark, run as its scripts run them: one process per script, which
first times every row (so that libraries have their workspaces and the allocator its segments) and
then measures memory row by row.

`python -m bf16prof.check.rows < rows.json` runs them on simulated GPUs and writes each row's peak,
in order, as JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bf16prof.profiles.gpus import Gpu, gpu_named

PROCESSES = 2
IMPORTED = (
    "bf16prof.check.kernels", "bf16prof.dry_run.world", "bf16prof.dry_run.hardware.accelerator",
    "torch.testing._internal.distributed.fake_pg",
    "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.ops.adam.fused_adam", "deepspeed.ops.adam.cpu_adam",
    "deepspeed.runtime.sequence_parallel.ulysses_sp",
)  # fmt: skip
WARM_UP = 1
FLUSHED_BYTES = 256_000_000
"""What triton's `do_bench` holds while it times, to flush the GPU's cache with."""
ITERATIONS = 2
"""The benchmark takes the median of ten; the gradients are made in the first, and the others are
alike."""


@dataclass(frozen=True)
class BenchmarkRow:
    """One measurement of the benchmark: `shape` are its fixed extents, `variable` the swept one,
    with value `x`.

    `gpu`: as torch calls it.
    """

    kernel: str
    implementation: str
    mode: str
    variable: str
    x: int
    shape: dict[str, Any]
    gpu: str

    @classmethod
    def of(cls, table: dict[str, Any]) -> BenchmarkRow:
        """From a row of a file, which may say more."""
        return cls(**{name: table[name] for name in cls.__annotations__} | {"x": int(table["x"])})

    def extents(self, multiprocessors: int) -> dict[str, Any]:
        """The whole shape, and what the GPU's random numbers depend on."""
        return {**self.shape, self.variable: self.x, "multiprocessors": multiprocessors}


def scripts(rows: Sequence[BenchmarkRow]) -> list[list[int]]:
    """The numbers of the rows that one run of a script made, for each such run."""

    def script(number: int) -> tuple[str, ...]:
        row = rows[number]
        return row.gpu, row.kernel, row.variable, json.dumps(row.shape)

    return [list(group) for _, group in groupby(sorted(range(len(rows)), key=script), script)]


def run_script(rows: Sequence[BenchmarkRow], device: Any, memory: Any, multiprocessors: int) -> Iterator[int]:
    """The peaks of the rows of one script in bytes, one after the other."""
    import torch

    from bf16prof.check.kernels import callable_of, peak_bytes

    timed = {(row.implementation, row.x): row for row in rows}.values()
    for mode in ("forward", "full"):
        for row in timed:
            call = callable_of(row.kernel, row.implementation, mode, row.extents(multiprocessors), device)
            call()
            flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
            for _ in range(WARM_UP):
                call()
            del call, flushed
            gc.collect()
    for row in rows:
        call = callable_of(row.kernel, row.implementation, row.mode, row.extents(multiprocessors), device)
        yield peak_bytes(call, memory, ITERATIONS)
        del call
        gc.collect()


def simulated(rows: Sequence[BenchmarkRow]) -> list[int]:
    """The peaks of the rows in bytes, each script in a process of its own: DeepSpeed and
    torch.distributed keep global state."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for module in IMPORTED:  # what the processes will not have to import again
        importlib.import_module(module)

    groups = scripts(rows)
    peaks: dict[int, int] = {}
    with multiprocessing.get_context("fork").Pool(PROCESSES, maxtasksperchild=1) as pool:
        for group, found in zip(groups, pool.imap(_in_a_world, [[rows[i] for i in group] for group in groups]), strict=True):
            peaks |= dict(zip(group, found, strict=True))
    return [peaks[index] for index in range(len(rows))]


def _in_a_world(rows: Sequence[BenchmarkRow]) -> list[int]:
    import warnings

    warnings.simplefilter("ignore")
    from bf16prof.check.kernels import PeakCounter
    from bf16prof.dry_run.tracker import GPU
    from bf16prof.dry_run.world import world

    gpu = gpu_named(rows[0].gpu)
    assert isinstance(gpu, Gpu), f"{rows[0].gpu} is not in the table of GPUs"
    with world(1, gpu) as tracker:
        gc.freeze()  # what has been imported is no garbage
        ledger = tracker.ledger
        memory = PeakCounter(ledger.take_phase_peak, ledger.take_phase_peak)
        return list(run_script(rows, GPU, memory, gpu.multiprocessors))


def main() -> None:
    """Rows in, peaks out."""
    peaks = simulated([BenchmarkRow.of(table) for table in json.load(sys.stdin)])
    sys.stdout.write("\n" + json.dumps(peaks) + "\n")


if __name__ == "__main__":
    main()
