"""The kernels of the benchmark on this machine's GPU, each against the same on a simulated one:
`python -m bf16prof.check.cuda` prints JSON.

Rows that would need more than `SHARE` of the GPU are left out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from bf16prof.check.rows import BenchmarkRow, run_script, scripts, simulated
from bf16prof.profiles.gpus import gpu_named

SHARE = 0.8
BF16 = "torch.bfloat16"
ROWS: tuple[tuple[Any, ...], ...] = (
    *(("cross_entropy", "pytorch", "full", "V", v, {"B": 8, "T": 2048}) for v in (4096, 32768)),
    *(("fused_linear_cross_entropy", "pytorch", "full", "BT", bt, {"H": 4096, "V": 128256, "dtype": BF16}) for bt in (4096, 8192)),
    *(
        (
            "swiglu",
            "pytorch",
            mode,
            "T",
            2048,
            {"B": 4, "hidden_size": 4096, "intermediate_size": 11008, "hidden_act": "silu", "dtype": BF16},
        )
        for mode in ("forward", "backward", "full")
    ),
    ("rms_norm", "pytorch", "full", "H", 8192, {"M": 2048, "dtype": BF16, "eps": 1e-6}),
    ("rms_norm", "liger", "full", "H", 8192, {"M": 2048, "dtype": BF16, "eps": 1e-6}),
    ("layer_norm", "pytorch", "full", "N", 8192, {"M": 4096, "dtype": "torch.float32", "eps": 1e-6}),
    ("rope", "pytorch", "full", "T", 4096, {"hidden_size": 8192, "num_q_heads": 32, "num_kv_heads": 8, "dtype": BF16}),
    ("jsd", "torch", "full", "V", 16384, {"B": 4, "T": 2048}),
    ("kl_div", "torch", "full", "V", 16384, {"B": 8, "T": 2048}),
)
"""Kernel, implementation, mode, swept variable, its value, and the rest of the shape: as in the
public benchmark."""


def main() -> None:
    """Measure and predict."""
    import torch

    from bf16prof.check.kernels import PeakCounter

    name = torch.cuda.get_device_name()
    gpu = gpu_named(name)
    if gpu is None:
        sys.exit(f"{name} is not in the table of GPUs")
    rows = [BenchmarkRow(*(*row, name)) for row in ROWS]
    predicted = simulated([dataclasses.replace(row, gpu=gpu.torch_name) for row in rows])
    fitting = [index for index, size in enumerate(predicted) if size < SHARE * torch.cuda.mem_get_info()[1]]
    memory = PeakCounter(torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated)
    found: dict[int, int] = {}
    for group in scripts([rows[index] for index in fitting]):
        numbers = [fitting[index] for index in group]
        peaks = run_script([rows[index] for index in numbers], torch.device("cuda"), memory, gpu.multiprocessors)
        found |= dict(zip(numbers, peaks, strict=True))
        torch.cuda.empty_cache()
    labels = [f"{row.kernel} {row.implementation} {row.mode} {row.variable}={row.x}" for row in rows]
    answer = [{"row": labels[index], "measured": found[index], "predicted": predicted[index]} for index in fitting]
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
