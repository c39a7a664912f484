"""The closed form against the dry run of the real engine, on a GPU that is not there: every
component, and the host's bytes, exactly.

What differs between ranks (stage 2, accumulating on the host) is left to `test_exact.py`: the dry
run is rank 0, the closed form speaks of the rank that holds most.
"""

from __future__ import annotations

import pytest

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.predict import predict
from bf16prof.dry_run.runner import simulate
from bf16prof.engine.constraints import admit
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Device, Label, Offload

pytestmark = [pytest.mark.timeout(280), pytest.mark.xdist_group("closed_form")]

FUSED_ADAM = ("optimizer.torch_adam=false", "optimizer.fused=false")
SMALL = ("model.hidden_size=66", "model.vocab_size=101", "model.num_layers=2", "model.num_heads=2", "model.intermediate_size=131")
GPT2 = (*SMALL, "model.family=gpt2", "model.tie_embeddings=false")
LLAMA = (*SMALL, "model.family=llama", "model.hidden_size=72", "model.num_heads=6", "model.num_kv_heads=2")
ZERO = "deepspeed.zero_optimization"


def jobs(sets: tuple[str, ...], stages: list[int], world: int, recipes: list[str], offload: Offload | None = None) -> list[Job]:
    profile = load_profile("cpu-demo", [parse_set(value) for value in (*FUSED_ADAM, *sets)]).profile
    return admit(expand(Selection(profile, stages, [world], recipes, Device.GPU, find_gpu("h100-80gb"), offload)))[0]


JOBS = [
    *jobs(SMALL, [0, 1, 2, 3], 2, ["bf16-fp32-master"]),
    *jobs(SMALL, [2, 3], 8, ["bf16-full-autocast", "autocast-fp32"]),
    *jobs(GPT2, [0, 1, 3], 1, ["fp32"]),
    *jobs((*GPT2, "optimizer.torch_adam=true", "optimizer.fused=true"), [0, 3], 4, ["fp16-fp32-master"]),
    *jobs((*LLAMA, "workload.gradient_accumulation_steps=2"), [1, 3], 64, ["bf16-full"]),
    *jobs((*LLAMA, "deepspeed.data_types.grad_accum_dtype=fp32", f"{ZERO}.parameter_alignment=true"), [1, 2, 3], 3, ["bf16-fp32-master"]),
    *jobs(SMALL, [1, 2, 3], 2, ["bf16-master"], Offload.OPTIMIZER),
    *jobs((*SMALL, f"{ZERO}.sub_group_size=20000", f"{ZERO}.offload_optimizer.ratio=0.5"), [3], 2, ["bf16-master"], Offload.OPTIMIZER),
    *jobs(SMALL, [0], 2, ["bf16-pure", "bf16-kahan"]),
    *jobs(LLAMA, [1], 4, ["bf16-fp32-states"]),
    *jobs((*SMALL, f"{ZERO}.sub_group_size=20000"), [3], 2, ["bf16-stochastic-rounding"]),
    *jobs(SMALL, [3], 2, ["bf16-full"], Offload.OPTIMIZER_AND_PARAMETERS),
    *jobs((*LLAMA, "optimizer.library=adamw-8bit"), [0, 3], 3, ["bf16-fp32-master"]),
    *jobs((*SMALL, "optimizer.library=adafactor"), [0, 1], 2, ["bf16-fp32-master"]),
    *jobs((*SMALL, "optimizer.library=sgd-momentum"), [3], 2, ["bf16-fp32-master"]),
]


@pytest.fixture(scope="module")
def dry_runs() -> list[MemoryRecord]:
    return simulate(JOBS)


def by_label(record: MemoryRecord) -> dict[Label, int]:
    return {(item.component, item.name): item.bytes for item in record.items}


@pytest.mark.parametrize("index", range(len(JOBS)), ids=[f"{job.profile.model.family}-{job.case.label}" for job in JOBS])
def test_the_closed_form_is_what_the_engine_holds(dry_runs: list[MemoryRecord], index: int) -> None:
    closed, dry = predict(JOBS[index]), dry_runs[index]

    assert closed.components == dry.components
    assert by_label(closed) == by_label(dry), "the same storages have the same names"
    assert closed.allocated_bytes == dry.allocated_bytes
    assert closed.host_bytes == dry.host_bytes
    assert closed.parameters == dry.parameters
