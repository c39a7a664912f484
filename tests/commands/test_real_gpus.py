"""The simulated GPU against real ones: public measurements that this project neither made nor
fitted anything to.

A difference is expected only where the data file says how many bytes and why
(`docs/against-gpus.md` shows it); nothing is tolerated.
"""

from __future__ import annotations

import numpy as np
import pytest
from measured_on_gpus import STEPS, Kernel, kernels, simulated_kernels, simulated_steps

pytestmark = pytest.mark.timeout(280)

FAST = [kernel for kernel in kernels() if not kernel.is_slow]


@pytest.mark.parametrize("kernel", FAST, ids=[kernel.label for kernel in FAST])
def test_a_row_of_the_benchmark_to_every_printed_digit(kernel: Kernel) -> None:
    peak = simulated_kernels()[kernel.label]

    assert np.float32((peak - kernel.difference) / 2**20) == np.float32(kernel.peak_mib)
    assert bool(kernel.difference) <= bool(kernel.why)


def test_differences_are_few_and_small() -> None:
    """All but the mixture of experts, whose blocks depend on what Liger's own kernels left
    behind."""
    differing = [kernel for kernel in kernels() if kernel.difference and kernel.table["kernel"] != "fused_moe"]

    assert len(differing) <= 4
    assert all(abs(kernel.difference) <= 16 * 2**10 for kernel in differing)


@pytest.mark.parametrize("index", range(len(STEPS["steps"])))
def test_a_whole_step_as_printed(index: int) -> None:
    step = STEPS["steps"][index]
    peak = simulated_steps()[index] + step.get("also_alive_bytes", 0)

    assert f"{peak / 1e9:.2f}" == step["peak_gb"]
