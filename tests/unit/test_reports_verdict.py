"""Whether a job has room on its GPU, in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import report_fixtures as fixtures

from bf16prof.profiles.beside import beside_the_allocator
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import Component, Device, Item, MemoryRecord, OutOfMemory, Phase, Source
from bf16prof.reports.verdict import allocator_limit, case_verdict, device_total, prediction_text, verdict
from bf16prof.reports.verdict import beside_the_allocator as beside_text
from bf16prof.reports.views import run_views

GIB = 2**30
TOTAL = find_gpu("h100-80gb").memory_bytes


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


def test_what_fits_says_all_three_numbers_and_of_how_much() -> None:
    record = dry_run(run_peak_allocated_bytes=19 * GIB, device_bytes=24 * GIB)
    assert told(record) == "fits h100-80gb: 19.00 GiB at most allocated, 23.00 GiB reserved, 24.00 of 79.18 GiB on the device"
    assert verdict(record) == case_verdict(run_views([fixtures.run([fixtures.estimate(fixtures.case()), record])])[0])


def test_without_init_the_training_peak_is_the_highest() -> None:
    assert "18.00 GiB at most allocated" in told(dry_run())


@pytest.mark.parametrize("gpu", [None, "a card of tomorrow"])
def test_of_an_unknown_gpu_no_size_is_made_up(gpu: str | None) -> None:
    text = told(dry_run(gpu=gpu, device_bytes=24 * GIB))
    assert text.endswith("23.00 GiB reserved, 24.00 GiB on the device")


def test_allocations_that_had_to_free_the_cache_are_said() -> None:
    assert told(dry_run(allocator_retries=3)).endswith("; 3 allocations find room only after the cache is freed")
    assert "cache" not in told(dry_run(allocator_retries=0))


def test_units_are_said_twice_where_they_differ() -> None:
    assert "790.00 MiB of 79.18 GiB on the device" in told(dry_run(device_bytes=790 * 2**20))


def test_a_gpu_is_known_by_its_id_and_by_the_name_that_torch_gives_it() -> None:
    assert device_total(dry_run(gpu="NVIDIA H100 80GB HBM3")) == device_total(dry_run()) == TOTAL


@pytest.mark.parametrize(
    "record",
    [
        fixtures.bare_record(),
        fixtures.estimate(fixtures.case()),
        fixtures.measure(fixtures.case()),
        dry_run(device=Device.CPU),
        dry_run(reserved_bytes=None),
    ],
    ids=["nothing known", "estimate", "measured", "ranks on a CPU", "older dry run"],
)
def test_who_does_not_model_the_allocator_gives_no_verdict(record: MemoryRecord) -> None:
    assert verdict(record) is None


@pytest.mark.parametrize(("beyond", "fits", "short"), [(0, True, "0 B free"), (1, False, "1 B over"), (-(2**20), True, "1.00 MiB free")])
@pytest.mark.parametrize("world_size", [1, 8])
def test_an_estimate_has_the_room_that_a_dry_run_has(beyond: int, fits: bool, short: str, world_size: int) -> None:
    case = fixtures.case(world=world_size)
    held = beside_the_allocator(world_size, (9, 0))
    limit = TOTAL - sum(item.bytes for item in held)
    dry = dataclasses.replace(dry_run(device_items=held), case=case)
    record = dataclasses.replace(fixtures.bare_record(case), gpu="h100-80gb", run_peak_allocated_bytes=limit + beyond)
    found = verdict(record)

    assert allocator_limit(record) == allocator_limit(dry) == limit < TOTAL - 400 * 2**20
    assert found is not None
    assert (found.fits, found.short) == (fits, short)
    assert f"CUDA context {held[0].bytes / 2**20:.2f} MiB" in found.text
    assert ("NCCL buffers 128.00 MiB" in found.text) is (world_size > 1)


def test_an_estimate_without_a_peak_is_judged_between_steps() -> None:
    record = dataclasses.replace(fixtures.bare_record(), gpu="h100-80gb", allocated_bytes=16 * GIB)
    assert told(record).startswith("has room on h100-80gb: 16.00 of 78.57 GiB allocated between steps; CUDA context")
    assert told(dataclasses.replace(record, peak_allocated_bytes=17 * GIB)).startswith(
        "has room on h100-80gb: 17.00 of 78.57 GiB allocated at most"
    )


def test_the_better_source_judges_a_case() -> None:
    guess = dataclasses.replace(fixtures.bare_record(), gpu="h100-80gb", allocated_bytes=16 * GIB)

    def judged(*records: MemoryRecord) -> str | None:
        found = case_verdict(run_views([fixtures.run([*records])])[0])
        return found.short if found else None

    assert judged(guess) == "62.57 GiB free"
    assert judged(guess, dry_run()) == "fits"
    assert judged(guess, fixtures.measure(fixtures.case())) is None, "it has run"


def test_a_shortage_says_when_what_and_who() -> None:
    holders = {Component.MOMENTUM: 20 * GIB, Component.PARAMETERS: 31 * GIB, Component.VARIANCE: 15 * GIB, Component.ACTIVATIONS: 10 * GIB}
    record = dry_run(
        out_of_memory=short(holders={**holders, Component.BUFFERS: GIB // 2, Component.GRADIENTS: GIB}, allocated_bytes=79 * GIB)
    )
    assert verdict(record) == dataclasses.replace(verdict(record), fits=False, short="out of memory in backward")  # type: ignore[type-var]
    assert told(record) == (
        "runs out of memory on h100-80gb in the backward phase of the second step, allocating 384.00 MiB for `parameter gradients`: "
        "79.00 GiB allocated, 78.00 of 79.00 GiB reserved; biggest holders: parameters 31.00 GiB, momentum 20.00 GiB, "
        "variance 15.00 GiB, activations 10.00 GiB; all other numbers are as if there were room"
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


def test_the_limit_is_the_shortages_or_what_the_device_leaves() -> None:
    context = Item(Component.WORKSPACE, "CUDA context", 500, "assumed")
    assert allocator_limit(dry_run(out_of_memory=short(), device_items=(context,))) == 79 * GIB
    assert allocator_limit(dry_run(device_items=(context, context))) == TOTAL - 1000
    assert allocator_limit(dry_run(gpu="a card of tomorrow", device_items=(context,))) is None
    assert allocator_limit(dry_run()) is None, "what the process holds besides is not known"


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
    assert prediction_text(dry_run(out_of_memory=short())).endswith("training peak 18.00 GiB, out of memory in backward")
    assert prediction_text(dry_run()).endswith("training peak 18.00 GiB, fits")
    assert prediction_text(fixtures.bare_record()) == "estimate: ? allocated, training peak unknown"
