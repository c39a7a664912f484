"""What the dry run leaves out to be fast changes nothing: remembered answers, DeepSpeed's loops
over ranks, and steps that repeat."""

from __future__ import annotations

import dataclasses
import multiprocessing.forkserver
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trace_fully
from harness import read_json
from test_closed_form import GPT2, LLAMA, SMALL, ZERO, jobs

from bf16prof.cases import Job, JobFile
from bf16prof.dry_run.task import Task
from bf16prof.files import write_json
from bf16prof.vocabulary import Device, Offload

pytestmark = pytest.mark.timeout(280)

ACCUMULATING = "workload.gradient_accumulation_steps=2"
CHECKPOINTING = "workload.activation_checkpointing=true"
JOBS = [
    *jobs((*SMALL, CHECKPOINTING), [3], 7, ["bf16-full-autocast"]),
    *jobs((*LLAMA, ACCUMULATING), [3], 4, ["bf16-fp32-master"]),
    *jobs((*LLAMA, f"{ZERO}.zero_hpz_partition_size=2"), [3], 4, ["bf16-fp32-master"]),
    *jobs((*GPT2, ACCUMULATING, CHECKPOINTING), [1, 2], 5, ["bf16-full"]),
    *jobs(GPT2, [0], 4, ["autocast-fp32"]),
    *jobs(SMALL, [3], 2, ["bf16-full"], Offload.OPTIMIZER_AND_PARAMETERS),
]
ACCUMULATION = "workload.gradient_accumulation_steps="
DROPPING = "workload.keeps_outputs=false"
LONG = [
    *jobs((*SMALL, f"{ACCUMULATION}11"), [0], 2, ["fp32"]),
    *jobs((*GPT2, f"{ACCUMULATION}12", DROPPING), [1], 4, ["bf16-full"]),
    *jobs((*SMALL, f"{ACCUMULATION}9", "deepspeed.data_types.grad_accum_dtype=fp32"), [1], 2, ["bf16-fp32-master"]),
    *jobs((*LLAMA, f"{ACCUMULATION}16", CHECKPOINTING), [2], 3, ["bf16-fp32-master"]),
    *jobs((*SMALL, f"{ACCUMULATION}13", DROPPING), [3], 4, ["bf16-full-autocast"]),
    *jobs((*GPT2, f"{ACCUMULATION}10"), [2], 2, ["bf16-fp32-master"], Offload.OPTIMIZER),
    *jobs((*SMALL, f"{ACCUMULATION}15", CHECKPOINTING), [3], 2, ["bf16-full"], Offload.OPTIMIZER_AND_PARAMETERS),
    *jobs((*SMALL, f"{ACCUMULATION}10", f"{ZERO}.overlap_comm=false"), [3], 2, ["fp16-fp32-master"]),
]
LONG_IDS = [f"{job.case.label}-{job.profile.workload.gradient_accumulation_steps}" for job in LONG]
IDS = [f"{job.profile.model.family}-{job.case.label}-{index}" for index, job in enumerate(JOBS)]


Trace = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def server() -> Iterator[multiprocessing.context.ForkServerContext]:
    """A process that has imported torch and DeepSpeed, once; every trace is a fresh fork of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "bf16prof.dry_run.dryrun"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        multiprocessing.forkserver.ensure_running()
    yield context


@pytest.fixture
def trace(tmp_path: Path, server: multiprocessing.context.ForkServerContext) -> Trace:
    """A function that gives the record of a job's dry run in which something is not left out (see
    `trace_fully`)."""

    def run(job: Job, what: str, steps: int = 2) -> dict[str, Any]:
        task, out = tmp_path / "task.json", tmp_path / f"{what}.json"
        write_json(task, Task(JobFile.of(job), steps))
        process = server.Process(target=trace_fully.trace, args=(task, what, out))
        process.start()
        process.join(200)
        process.kill()
        assert process.exitcode == 0, out.with_suffix(".log").read_text(encoding="utf-8")[-2000:]
        record: dict[str, Any] = read_json(out)["records"][0]
        if "autocast" in job.case.recipe:
            del record["timeline"]  # autocast forgets its casted weights in the order of their addresses
        return record

    return run


@pytest.mark.parametrize("job", JOBS, ids=IDS)
def test_a_full_trace_gives_the_same_record(trace: Trace, job: Job) -> None:
    assert trace(job, "answers,ranks") == trace(job, "nothing")


def test_padding_for_many_ranks_is_what_a_tensor_for_each_of_them_takes(trace: Trace) -> None:
    """Most parameters have fewer elements than there are ranks. Only the timeline is another: its
    events are fewer."""
    (job,) = jobs(SMALL, [3], 600, ["bf16-fp32-master"])

    with_tensors, without = trace(job, "ranks"), trace(job, "nothing")

    assert with_tensors.pop("timeline") != without.pop("timeline")
    assert with_tensors == without


@pytest.mark.parametrize("job", JOBS, ids=IDS)
def test_steps_that_are_run_are_those_that_are_repeated(trace: Trace, job: Job) -> None:
    """On CPU ranks, where the order of events is all there is; and on a GPU, where the caching
    allocator settles meanwhile."""
    on_cpu = dataclasses.replace(job, device=Device.CPU, gpu=None)
    if job.case.offload is Offload.NONE:
        assert trace(on_cpu, "steps", steps=4) == trace(on_cpu, "nothing")

    run, repeated = trace(job, "steps", steps=14), trace(job, "nothing")
    for key in ("allocated_bytes", "components", "peak_allocated_bytes", "peak_phase", "phases", "reserved_bytes", "peak_components"):
        assert run[key] == repeated[key], key


@pytest.mark.parametrize("job", LONG, ids=LONG_IDS)
def test_micro_steps_that_are_left_out_are_those_that_would_be_run(trace: Trace, job: Job) -> None:
    """Everything but the timeline, which has fewer events where some are left out: on a GPU, and on
    CPU ranks."""
    on_cpu = dataclasses.replace(job, device=Device.CPU, gpu=None)
    runs_on_cpu = job.case.offload is Offload.NONE and "fp16" not in job.case.recipe
    for each in (job, on_cpu) if runs_on_cpu else (job,):
        run, left_out = trace(each, "micro-steps"), trace(each, "nothing")
        lines = [record.pop("timeline", None) for record in (run, left_out)]
        assert run == left_out
        if each is on_cpu and all(lines):
            assert lines[1]["events"][-1] < lines[0]["events"][-1], "nothing has been left out"
