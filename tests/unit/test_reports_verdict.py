"""Whether a job has room on its GPU, in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import report_fixtures as fixtures

from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import Item, MemoryRecord, OutOfMemory
from bf16prof.reports import palette
from bf16prof.reports.verdict import beside_the_allocator as beside_text
from bf16prof.reports.verdict import case_verdict, prediction_text, verdict
from bf16prof.reports.views import run_views
from bf16prof.step_records import PhaseMemory
from bf16prof.verdict import gpu_limit
from bf16prof.vocabulary import Component, Device, Phase, Source, Verdict

GIB = 2**30
LIMIT = gpu_limit(find_gpu("h100-80gb"), 4)


def dry_run(**values: Any) -> MemoryRecord:
    usual = {"gpu": "h100-80gb", "allocated_bytes": 16 * GIB, "peak_allocated_bytes": 18 * GIB, "reserved_bytes": 23 * GIB}
    return MemoryRecord(Source.SIMULATE, fixtures.case(), values.pop("device", Device.GPU), 1000, **{**usual, **values})


def short(**values: Any) -> OutOfMemory:
    usual: dict[str, Any] = {
        "phase": Phase.BACKWARD, "step": 1, "tensor": "parameter gradients", "requested_bytes": 384 * 2**20,
        "allocated_bytes": 77 * GIB, "reserved_bytes": 78 * GIB, "limit_bytes": 79 * GIB, "holders": {Component.PARAMETERS: 77 * GIB},
    }  # fmt: skip
    return OutOfMemory(**{**usual, **values})


def told(record: MemoryRecord) -> str:
    found = verdict(record)
    assert found is not None
    return found.text


def estimate(**values: Any) -> MemoryRecord:
    usual: dict[str, Any] = {"gpu": "h100-80gb", "allocated_bytes": 16 * GIB, "limit_bytes": LIMIT, "margin": 0.1}
    return dataclasses.replace(fixtures.bare_record(), **{**usual, **values})


def test_what_fits_says_all_its_numbers_and_of_how_much() -> None:
    record = dry_run(run_peak_allocated_bytes=19 * GIB, device_bytes=24 * GIB, limit_bytes=LIMIT)
    assert told(record) == (
        "fits h100-80gb: the run's peak is 19.00 GiB of the 78.48 GiB that the allocator may reserve; 23.00 GiB reserved; "
        "24.00 of 79.18 GiB on the device"
    )
    assert verdict(record) == case_verdict(run_views([fixtures.run([fixtures.estimate(fixtures.case()), record])])[0])


def test_without_init_the_training_peak_is_the_highest() -> None:
    assert "the run's peak is 18.00 GiB" in told(dry_run())
    assert "the step's peak is 18.00 GiB (backward)" in told(dry_run(phases={Phase.BACKWARD: PhaseMemory(18 * GIB, 0)}))
    assert "init's peak is 18.00 GiB" in told(dry_run(phases={Phase.INIT: PhaseMemory(18 * GIB, 0)}))


@pytest.mark.parametrize("gpu", [None, "a card of tomorrow"])
def test_of_an_unknown_gpu_no_size_is_made_up(gpu: str | None) -> None:
    said = verdict(dry_run(gpu=gpu, device_bytes=24 * GIB))
    assert said is not None
    assert (said.short, said.answer) == ("fits", Verdict.FITS)
    assert said.text.endswith("23.00 GiB reserved; 24.00 GiB on the device")


def test_allocations_that_had_to_free_the_cache_are_said() -> None:
    assert told(dry_run(allocator_retries=3)).endswith("; 3 allocations find room only after the cache is freed")
    assert "cache" not in told(dry_run(allocator_retries=0))


def test_units_are_said_twice_where_they_differ() -> None:
    assert "790.00 MiB of 79.18 GiB on the device" in told(dry_run(device_bytes=790 * 2**20))


def test_an_estimate_says_what_its_replay_found_and_what_it_keeps() -> None:
    assert told(estimate(run_peak_allocated_bytes=42 * GIB, reserved_bytes=51 * GIB)) == (
        "fits h100-80gb: the run's peak is 42.00 GiB of the 78.48 GiB that the allocator may reserve; 51.00 GiB reserved by the replayed "
        "allocator of 70.63 GiB (10% kept for what the replay does not know)"
    )
    assert told(estimate(run_peak_allocated_bytes=72 * GIB)).startswith("tight on h100-80gb: the run's peak is 72.00 GiB")


@pytest.mark.parametrize(
    ("record", "short", "style"),
    [
        (dry_run(limit_bytes=LIMIT), "fits, 55.48 GiB free", "good"),
        (dry_run(limit_bytes=LIMIT, reserved_bytes=LIMIT + 2**30), "tight, 1.00 GiB short", "warn"),
        (dry_run(limit_bytes=LIMIT, run_peak_allocated_bytes=LIMIT + 2 * GIB), "does not fit, 2.00 GiB too much", "bad"),
        (estimate(run_peak_allocated_bytes=LIMIT + 2 * GIB), "does not fit, 2.00 GiB too much", "bad"),
    ],
)
def test_three_answers_each_with_its_symbol_and_its_colour(record: MemoryRecord, short: str, style: str) -> None:
    said = verdict(record)
    assert said is not None
    assert (said.short, said.style) == (short, style)
    assert said.marked == f"{palette.SYMBOLS[style]} {short}"
    assert style in palette.CONSOLE


def test_the_better_source_judges_a_case() -> None:
    guess = estimate(peak_allocated_bytes=17 * GIB)
    ran = dataclasses.replace(fixtures.measure(fixtures.case()), device=Device.GPU, verdict=Verdict.DOES_NOT_FIT)

    def judged(*records: MemoryRecord) -> Verdict | None:
        found = case_verdict(run_views([fixtures.run([*records])])[0])
        return found.answer if found else None

    assert judged(guess) is Verdict.FITS
    assert judged(guess, dry_run(limit_bytes=GIB)) is Verdict.DOES_NOT_FIT
    assert judged(dry_run(), ran) is Verdict.DOES_NOT_FIT, "it has run"


def test_where_only_init_does_not_fit_the_way_out_is_said() -> None:
    init = {Phase.INIT: PhaseMemory(134 * GIB, 0)}
    text = told(estimate(run_peak_allocated_bytes=134 * GIB, phases=init, inside_zero_init_bytes=46 * GIB))
    assert text.endswith("only init does not fit: init 134.00 GiB; inside deepspeed.zero.Init 46.00 GiB (--zero-init)")


def test_a_shortage_speaks_of_the_whole_and_then_of_the_request() -> None:
    holders = {Component.MOMENTUM: 20 * GIB, Component.PARAMETERS: 31 * GIB, Component.VARIANCE: 15 * GIB, Component.ACTIVATIONS: 10 * GIB}
    record = dry_run(
        run_peak_allocated_bytes=269 * GIB,
        phases={Phase.BACKWARD: PhaseMemory(269 * GIB, 0)},
        out_of_memory=short(holders={**holders, Component.BUFFERS: GIB // 2, Component.GRADIENTS: GIB}, allocated_bytes=79 * GIB),
    )
    assert told(record) == (
        "does not fit h100-80gb: the step's peak is 269.00 GiB (backward), 190.00 GiB too much; it runs out of memory in the backward "
        "phase of the second step, allocating 384.00 MiB for `parameter gradients`: 79.00 GiB allocated, 78.00 of 79.00 GiB reserved; "
        "biggest holders: parameters 31.00 GiB, momentum 20.00 GiB, variance 15.00 GiB, activations 10.00 GiB; all other numbers are as "
        "if there were room"
    )


def test_holders_below_a_hundredth_are_left_out() -> None:
    text = told(dry_run(out_of_memory=short(holders={Component.PARAMETERS: 76 * GIB, Component.BUFFERS: 77 * GIB // 100 - 1})))
    assert "biggest holders: parameters 76.00 GiB;" in text


@pytest.mark.parametrize(("requested", "fragmented"), [(2 * GIB, True), (2 * GIB + 1, False)])
def test_fragmentation_is_blamed_where_the_bytes_would_do(requested: int, fragmented: bool) -> None:
    text = told(dry_run(out_of_memory=short(requested_bytes=requested)))
    assert ("without fragmentation there would be room" in text) is fragmented


@pytest.mark.parametrize(
    ("phase", "step", "words"),
    [
        (Phase.INIT, None, "in init,"),
        (Phase.FORWARD, 0, "in the forward phase of the first step,"),
        (Phase.STEP, 2, "in the step phase of the third step,"),
        (Phase.STEP, 7, "in the step phase of step 7 (counted from 0),"),
    ],
)
def test_the_instant_is_said(phase: Phase, step: int | None, words: str) -> None:
    assert words in told(dry_run(out_of_memory=short(phase=phase, step=step)))


def test_what_the_device_adds_comes_with_its_assumption() -> None:
    items = (Item(Component.WORKSPACE, "CUDA context", 500 * 2**20, "assumed: 500 MiB"), Item(Component.BUFFERS, "NCCL buffers", 2**20))
    expected = "on the device besides the allocator: CUDA context 500.00 MiB (assumed: 500 MiB), NCCL buffers 1.00 MiB"
    assert beside_text(dry_run(device_items=items)) == expected
    assert beside_text(dry_run()) == ""


@pytest.mark.parametrize("text", fixtures.HOSTILE)
def test_names_stay_on_their_line(text: str) -> None:
    record = fixtures.hostile_simulation(fixtures.case(), text)
    assert told(record).isprintable()
    assert beside_text(record).isprintable()
    assert told(dry_run(gpu=text)).isprintable()


def test_a_prediction_beside_a_failure_says_whether_it_saw_it_coming() -> None:
    assert prediction_text(dry_run(out_of_memory=short())).endswith("training peak 18.00 GiB, tight")
    assert prediction_text(dry_run()).endswith("training peak 18.00 GiB, fits")
    assert prediction_text(fixtures.bare_record()) == "estimate: ? allocated, training peak unknown"
