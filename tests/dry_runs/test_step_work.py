"""The work of a step against the real engine: DeepSpeed's collectives and PyTorch's operations in
dry runs (see `count_work.py`)."""

from __future__ import annotations

import collections
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import job, profile, step_work

from bf16prof.cases import Job, JobFile
from bf16prof.documents import as_json
from bf16prof.vocabulary import Device

COUNTER = Path(__file__).with_name("count_work.py")

SMALL = {
    "model__hidden_size": 66, "model__num_layers": 3, "model__num_heads": 3, "model__vocab_size": 101, "workload__data": "synthetic",
    "workload__sequence_length": 32, "workload__micro_batch_size": 2,
}  # fmt: skip
ZERO = "deepspeed__zero_optimization__"
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "accumulated and recomputed": {
        "workload__activation_checkpointing": True,
        "workload__gradient_accumulation_steps": 4,
        f"{ZERO}stage3_max_reuse_distance": 40_000,
        f"{ZERO}stage3_prefetch_bucket_size": 0,
        f"{ZERO}reduce_bucket_size": 10_000,
    },
    "prefetched and recomputed": {
        "workload__activation_checkpointing": True,
        f"{ZERO}stage3_max_reuse_distance": 30_000,
        f"{ZERO}stage3_prefetch_bucket_size": 20_000,
    },
    "whole reductions": {
        f"{ZERO}reduce_scatter": False,
        f"{ZERO}reduce_bucket_size": 10_000,
        f"{ZERO}memory_efficient_linear": False,
        "workload__activation_checkpointing": True,
    },
    "to owners": {
        f"{ZERO}use_multi_rank_bucket_allreduce": False,
        f"{ZERO}round_robin_gradients": True,
        f"{ZERO}stage3_use_all_reduce_for_fetch_params": True,
    },
    "fp32 on the way": {"deepspeed__communication_data_type": "fp32", f"{ZERO}stage3_allgather_sequential": True},
    "accumulated in fp32": {"deepspeed__data_types__grad_accum_dtype": "fp32"},
}
STAGES = {"accumulated in fp32": (1,)}
"""Where only some stages differ."""


def _jobs(family: str) -> list[Job]:
    """Every variant and stage for gpt2, autocast where it makes a difference; for the other
    families those whose order of calls shows."""
    jobs = []
    for name, variant in VARIANTS.items():
        settings = profile("cpu-demo", model__family=family, **SMALL, **variant)
        orders_show = "recomputed" in name
        if family == "gpt2" or orders_show:
            stages = STAGES.get(name, (0, 1, 2, 3)) if family == "gpt2" else (3,)
            recipes = ("bf16-fp32-master", "autocast-fp32") if orders_show else ("bf16-fp32-master",)
            jobs += [job(settings, *case, device=Device.CPU) for case in itertools.product(stages, (4,), recipes)]
    return jobs


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.nightly), "llama", "transformer-postln"])
def test_collectives_and_operations_are_those_of_the_engine(family: str) -> None:
    jobs = _jobs(family)
    lines = "".join(json.dumps(as_json(JobFile.of(j))) + "\n" for j in jobs)
    done = subprocess.run([sys.executable, str(COUNTER)], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counted = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    for one, found in zip(jobs, counted, strict=True):
        work = step_work(one)
        sizes: collections.Counter[str] = collections.Counter()
        for transfer in work.transfers:
            sizes[f"{transfer.phase} {transfer.collective} bytes"] += transfer.size_bytes
            sizes[f"{transfer.phase} {transfer.collective} calls"] += transfer.calls
        assert dict(sizes) == found["counts"], one.case.label
        assert work.hardware_flops == found["flops"], one.case.label
