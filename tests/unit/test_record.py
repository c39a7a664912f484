"""From what ranks wrote to the record of a case."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bf16prof.cases import Job
from bf16prof.measuring.launcher import RanksOutcome
from bf16prof.measuring.record import measured_record
from bf16prof.measuring.results import RankResult
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.profiles.models import FactorySettings
from bf16prof.profiles.recipes import find_recipe
from bf16prof.records import Case, Item, MemoryRecord
from bf16prof.runs import Status
from bf16prof.step_records import PhaseMemory, StepRecord, StepWork
from bf16prof.vocabulary import Component, Device, Phase

C = Component
SETS = ("workload.micro_batch_size=3", "workload.sequence_length=10", "workload.gradient_accumulation_steps=2")
JOB = Job(
    Case("cpu-demo", 2, 2, "bf16-full"),
    load_profile("cpu-demo", [parse_set(value) for value in SETS]).profile,
    find_recipe("bf16-full"),
    Device.CPU,
)
ITEMS = (Item(C.PARAMETERS, "flat parameters", 70), Item(C.MOMENTUM, "exp_avg", 20), Item(C.PARAMETERS, "model buffers", 5))


def step(
    number: int, *, loss: float | None = 1.0, time_s: float = 1.0, peaks: tuple[int, int, int] = (1, 1, 1), warmup: bool = False
) -> StepRecord:
    phases = (Phase.FORWARD, Phase.BACKWARD, Phase.STEP)
    memory = {phase: PhaseMemory(peak, peak - 1) for phase, peak in zip(phases, peaks, strict=True)}
    return StepRecord(number, loss, time_s, 95, memory, warmup)


def rank(number: int, *steps: StepRecord, **changes: Any) -> RankResult:
    whole = RankResult(
        number, 1000 + number, Status.FINISHED, Device.CPU, "cpu", parameters=123, init=PhaseMemory(40, 30), steps=steps,
        allocated_bytes=95, items=ITEMS, run_peak_bytes=300,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def record(*ranks: RankResult | None, status: Status = Status.FINISHED, message: str = "") -> MemoryRecord:
    found = measured_record(JOB, RanksOutcome(status, message, "", ranks))
    assert found is not None
    return found


def test_a_model_that_reads_no_tokens_has_no_tokens_per_second() -> None:
    image = FactorySettings.model_validate({"factory": "a:b", "inputs": {"x": {"dtype": "fp32", "shape": ["micro_batch", 3]}}})
    job = dataclasses.replace(JOB, profile=JOB.profile.model_copy(update={"model": image}))
    found = measured_record(job, RanksOutcome(Status.FINISHED, "", "", (rank(0, step(0)), rank(1, step(0)))))

    assert found is not None
    assert (found.step_time_s, found.tokens_per_s) == (1.0, None)


def test_components_are_the_items_and_what_is_left_is_other() -> None:
    whole = record(rank(0, step(0)), rank(1, step(0)))
    unexplained = record(rank(0, step(0), allocated_bytes=102), rank(1, step(0)))
    overexplained = record(rank(0, step(0), allocated_bytes=90), rank(1, step(0), allocated_bytes=90))

    assert (whole.components[C.PARAMETERS], whole.components[C.MOMENTUM], whole.components.get(C.OTHER, 0)) == (75, 20, 0)
    assert unexplained.components[C.OTHER] == 7
    assert overexplained.components[C.OTHER] == overexplained.allocated_bytes, "items that are more than all there is explain nothing"
    assert not any(overexplained.components[component] for component in C if component is not C.OTHER)
    assert any(note.startswith("components are not known: the engine holds 95 B") for note in overexplained.notes)
    for found in (whole, unexplained, overexplained):
        assert sum(found.components.values()) == found.allocated_bytes == sum(item.bytes for item in found.items)


def test_the_record_is_the_heaviest_ranks() -> None:
    found = record(
        rank(0, step(0, peaks=(9, 9, 9)), allocated_bytes=95),
        rank(1, step(0, peaks=(5, 7, 6)), allocated_bytes=105, run_peak_bytes=400, reserved_bytes=500, device_name="H200"),
        rank(2, step(0), allocated_bytes=105, run_peak_bytes=399),
    )

    assert found.allocated_bytes == 105
    assert [rank.allocated_bytes for rank in found.ranks] == [95, 105, 105]
    assert (found.run_peak_allocated_bytes, found.reserved_bytes, found.gpu) == (400, 500, "H200")
    assert (found.peak_allocated_bytes, found.peak_phase) == (7, Phase.BACKWARD)


def test_among_equals_the_first_rank_stands_for_all() -> None:
    assert record(rank(0, step(0, peaks=(2, 3, 4))), rank(1, step(0, peaks=(7, 8, 9)))).peak_allocated_bytes == 4


def test_the_peak_of_training_leaves_init_out() -> None:
    found = record(rank(0, step(0, peaks=(3, 2, 1)), init=PhaseMemory(999, 30)), rank(1, step(0)))

    assert (found.peak_allocated_bytes, found.peak_phase) == (3, Phase.FORWARD)
    assert found.phases[Phase.INIT] == PhaseMemory(999, 30)


def test_phases_keep_the_highest_peak_and_the_last_end_of_all_steps() -> None:
    found = record(rank(0, step(0, peaks=(8, 5, 5)), step(1, peaks=(6, 9, 5)), step(2, peaks=(7, 4, 5))), rank(1))

    assert found.phases[Phase.FORWARD] == PhaseMemory(8, 6)
    assert found.phases[Phase.BACKWARD] == PhaseMemory(9, 3)


def test_losses_are_means_and_times_the_slowest_of_the_ranks() -> None:
    found = record(
        rank(0, step(0, loss=9.0, time_s=90.0, warmup=True), step(1, loss=4.0, time_s=1.0), step(2, loss=3.0, time_s=4.0)),
        rank(1, step(0, loss=7.0, time_s=95.0, warmup=True), step(1, loss=2.0, time_s=2.0), step(2, loss=1.0, time_s=3.0)),
    )

    assert [(s.loss, s.time_s) for s in found.steps] == [(8.0, 95.0), (3.0, 2.0), (2.0, 4.0)]
    assert found.loss == 2.0
    assert found.step_time_s == 3.0, "the median of the measured steps, the warm-up left out"
    assert found.tokens_per_s == 3 * 10 * 2 * 2 / 3.0
    assert found.step_time_iqr_s == pytest.approx(1.0)


def test_a_loss_that_one_rank_does_not_have_is_not_averaged_away() -> None:
    found = record(rank(0, step(0, loss=5.0), step(1, loss=4.0)), rank(1, step(0, loss=3.0), step(1, loss=None)))

    assert [s.loss for s in found.steps] == [4.0, None]
    assert found.loss is None
    assert found.notes == ("the loss was not finite in 1 of 2 steps, first in step 2",)


def test_one_measured_step_has_a_time_and_no_spread() -> None:
    found = record(rank(0, step(0, time_s=5.0)), rank(1, step(0, time_s=4.0)))

    assert (found.step_time_s, found.step_time_iqr_s) == (5.0, None)


def test_a_case_that_failed_keeps_what_is_known_and_says_that_it_is_partial() -> None:
    unfinished = {"status": Status.RUNNING, "allocated_bytes": None, "items": ()}
    found = record(
        rank(0, step(0), step(1), **unfinished, run_peak_bytes=200), None, rank(2, step(0), **unfinished, run_peak_bytes=250),
        status=Status.FAILED, message="rank 1: killed by SIGKILL",
    )  # fmt: skip

    assert found.notes == ("partial: failed: rank 1: killed by SIGKILL",)
    assert (found.allocated_bytes, found.components, found.items) == (None, {}, ())
    assert [(rank.rank, rank.allocated_bytes) for rank in found.ranks] == [(0, None), (2, None)]
    assert found.run_peak_allocated_bytes == 250, "the highest peak of the ranks that wrote one"
    assert len(found.steps) == 1
    assert found.parameters == 123


def test_ranks_that_never_built_an_engine_give_no_record() -> None:
    young = RankResult(0, 1, Status.RUNNING, Device.CPU, "cpu")

    assert measured_record(JOB, RanksOutcome(Status.FAILED, "rank 0: exit code 1", "", (young, None))) is None


def test_a_rank_that_stopped_before_its_first_step_gives_init_only() -> None:
    found = record(rank(0, allocated_bytes=None, items=(), run_peak_bytes=45), status=Status.OOM, message="rank 0: out of memory")

    assert found.phases == {Phase.INIT: PhaseMemory(40, 30)}
    assert (found.peak_allocated_bytes, found.peak_phase, found.loss, found.step_time_s, found.tokens_per_s) == (None,) * 5


def test_host_bytes_are_those_of_the_host_items() -> None:
    host = (Item(C.MASTER_PARAMETERS, "master parameters", 400), Item(C.VARIANCE, "exp_avg_sq", 11))

    assert record(rank(0, step(0), host_items=host), rank(1)).host_bytes == 411
    assert record(rank(0, step(0)), rank(1)).host_bytes is None


def test_a_higher_peak_of_another_rank_is_said() -> None:
    def ranks(peak: int, warmup: bool = True) -> MemoryRecord:
        first = [step(index, warmup=warmup, peaks=(1000, 1, 1)) for index in range(2)]
        second = [step(index, warmup=warmup, peaks=(1, peak, 1)) for index in range(2)]
        return record(rank(0, *first), rank(1, *second))

    assert ranks(1100).notes == ("the peak of rank 1 is 100 bytes higher than that of rank 0, of which this is",)
    assert ranks(1001).notes == ()
    assert ranks(1100, warmup=False).notes == (), "in timed steps memory does not settle"


def test_times_of_phases_are_those_of_the_slowest_rank() -> None:
    slow, fast = ({Phase.FORWARD: share} for share in (0.7, 0.2))
    ranks = [
        rank(number, dataclasses.replace(step(0, time_s=time_s), phase_time_s=phases))
        for number, (time_s, phases) in enumerate(((1.0, fast), (2.0, slow)))
    ]

    assert record(*ranks).steps[0].phase_time_s == slow


def test_utilisation_is_known_where_the_gpu_is() -> None:
    """40 TFLOP of the model and 10 recomputed in half a second on an H100 of 989.5 TFLOP/s."""
    work = StepWork(1000, "bf16", 10**13, 3 * 10**13, 10**13, (), 1, 1, floor_s={"compute": 0.05})
    card = dataclasses.replace(find_gpu("h100-80gb"), id="NVIDIA H100 80GB HBM3")
    outcome = RanksOutcome(Status.FINISHED, "", "", (rank(0, step(0, time_s=0.5)), rank(1, step(0, time_s=0.5))))

    on_gpu, on_cpu = (measured_record(dataclasses.replace(JOB, gpu=gpu), outcome, work) for gpu in (card, None))

    assert on_gpu is not None
    assert on_cpu is not None
    assert on_gpu.mfu == pytest.approx(80 / 989.5)
    assert on_gpu.hfu == pytest.approx(100 / 989.5)
    assert on_gpu.step_time_floor_s == 0.05
    assert "989.5 TFLOP/s, the dense bf16 peak of h100-80gb" in on_gpu.notes[-1]
    assert (on_cpu.mfu, on_cpu.hfu, on_cpu.notes) == (None, None, ())
