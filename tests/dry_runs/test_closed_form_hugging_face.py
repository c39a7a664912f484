"""The closed form of transformers' models against the dry run of the real engine: one case on a GPU
and one on CPUs for every model type.

Which stage, world size and recipe a model type has changes from one to the next, so that all
together see all of them. DeepSpeed refuses fp16 on CPUs, and torch knows the shapes of a mixture's
grouped products only in bf16, so these have cases of their own.
"""

from __future__ import annotations

import itertools

import pytest
from hugging_face import TINY, config

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.predict import predict
from bf16prof.dry_run.runner import simulate
from bf16prof.engine.constraints import admit
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Device

pytestmark = [pytest.mark.timeout(560), pytest.mark.xdist_group("closed_form_hugging_face")]

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
CASES = {
    (Device.GPU, False): [
        (0, 1, "fp32"),
        (3, 2, "bf16-full"),
        (2, 4, "autocast-fp32"),
        (0, 2, "fp16-fp32-master"),
        (3, 4, "bf16-fp32-master"),
    ],
    (Device.CPU, False): [(1, 2, "bf16-fp32-master"), (3, 4, "bf16-full-autocast"), (3, 1, "autocast-fp32"), (2, 2, "bf16-full")],
    (Device.GPU, True): [(3, 2, "bf16-full"), (0, 2, "bf16-fp32-master")],
    (Device.CPU, True): [(1, 4, "bf16-fp32-master"), (3, 1, "bf16-full")],
}
"""Stages, world sizes and recipes in turn, by device and by whether the model is a mixture of
experts."""


def job(model_type: str, device: Device, stage: int, world: int, recipe: str, *, zero_init: bool = False) -> Job:
    """A case of a tiny model, updated by FusedAdam."""
    values = {
        "model.hf_config": config(model_type), "optimizer.torch_adam": False, "optimizer.fused": False, "workload.data": "synthetic",
        "workload.sequence_length": 24, "workload.zero_init": zero_init,
    }  # fmt: skip
    profile = load_profile("cpu-demo", [Override(key, value, "test") for key, value in values.items()]).profile
    gpu = find_gpu("h100-80gb") if device is Device.GPU else None
    return admit(expand(Selection(profile, [stage], [world], [recipe], device, gpu)))[0][0]


def jobs() -> list[Job]:
    """All cases."""
    turns = {key: itertools.cycle(cases) for key, cases in CASES.items()}
    found = [job(model_type, device, *next(turns[device, model_type in MIXTURES])) for model_type in TINY for device in Device]
    return [*found, *(job("gemma", device, 3, 2, "bf16-fp32-master", zero_init=True) for device in Device)]


JOBS = jobs()


@pytest.fixture(scope="module")
def dry_runs() -> list[MemoryRecord]:
    return simulate(JOBS)


@pytest.mark.parametrize("index", range(len(JOBS)), ids=[f"{job.profile.model.family}-{job.device}-{job.case.label}" for job in JOBS])
def test_the_closed_form_is_what_the_engine_holds(dry_runs: list[MemoryRecord], index: int) -> None:
    assert closed_form_gap(JOBS[index]) is None
    closed, dry = predict(JOBS[index]), dry_runs[index]

    assert closed.components == dry.components
    assert closed.allocated_bytes == dry.allocated_bytes
    assert closed.host_bytes == dry.host_bytes
    assert closed.parameters == dry.parameters
