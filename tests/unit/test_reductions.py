"""What CUDA's reductions leave in global memory, against real GPUs, and where one block of threads
does it alone."""

from __future__ import annotations

import pytest

from bf16prof.reductions import Processor, Reduction, global_memory, threads_per_multiprocessor

A100 = Processor(108, 2048)
MIB = 2**20


@pytest.mark.parametrize(
    ("width", "beyond_mib"),
    # Liger-Kernel's RMS norm rows on an A100 (2,048 rows): the measured peak without the tensors
    # that are alive, in MiB.
    [
        (1024, 36.02392578125 - 20.0234375),
        (2048, 72.03955078125 - 40.0390625),
        (4096, 144.07080078125 - 80.0703125),
        (8192, 268.13330078125 - 160.1328125),
        (16384, 432.25830078125 - 320.2578125),
        (32768, 752.5087890625 - 640.5078125),
    ],
)
def test_a_sum_over_rows_takes_what_an_a100_showed(width: int, beyond_mib: float) -> None:
    parts = global_memory(Reduction((2048, width), (width, 1), (0,), 4, 4), A100)

    assert sum(-(-part // 512) * 512 for part in parts) == pytest.approx(beyond_mib * MIB, abs=512)


def test_one_block_needs_no_global_memory() -> None:
    assert global_memory(Reduction((512, 4096), (4096, 1), (0,), 2, 4), A100) == (), "too few rows to be cut"
    assert global_memory(Reduction((4096, 1024), (1024, 1), (1,), 2, 4), A100) == (), "each row is a block's own"
    assert global_memory(Reduction((0, 4), (4, 1), (0,), 4, 4), A100) == ()


def test_half_precision_over_two_gib_is_added_up_beside_the_output() -> None:
    long = Reduction((600_000, 4096), (4096, 1), (0,), 2, 4, accumulates_in_output=False)

    assert global_memory(long, A100)[0] == 4096 * 4
    exact = Reduction((600_000, 4096), (4096, 1), (0,), 2, 4)
    assert len(global_memory(exact, A100)) == len(global_memory(long, A100)) - 1


def test_threads_of_a_multiprocessor() -> None:
    assert [threads_per_multiprocessor(each) for each in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0))] == [1024, 2048, 1536, 2048, 1536]
