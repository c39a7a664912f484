"""The ledger of a dry run: what is alive, what it is for, and when; steps done again on the allocator's side; the snapshot."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest

from bf16prof.allocator import CachingAllocator
from bf16prof.dry_run.history import POINTS, items_at, layers_at, timeline, training_peak
from bf16prof.dry_run.ledger import Allocation, Ledger, by_component
from bf16prof.dry_run.repeat import last_step, repeat
from bf16prof.dry_run.snapshot import snapshot, write_snapshot
from bf16prof.records import Component, LayerBytes, Phase

MIB = 2**20
WEIGHTS = (Component.PARAMETERS, "weights")
ACTIVATIONS = (Component.ACTIVATIONS, "gelu (forward)")


def gpu_ledger(limit: int | None = None) -> Ledger:
    return Ledger(CachingAllocator(limit))


def a_step(ledger: Ledger, carried: Allocation | None, activations: int = 3 * MIB) -> Allocation:
    """One optimizer step: what the last one left is replaced, something is allocated and freed in forward and backward."""
    ledger.begin_step()
    ledger.mark(Phase.FORWARD)
    saved = ledger.begin(activations, ACTIVATIONS)
    logits = ledger.begin(MIB, (Component.ACTIVATIONS, "logits"))
    if carried is not None:
        ledger.end(carried)
    ledger.mark(Phase.BACKWARD)
    ledger.touch(100, (Component.WORKSPACE, "scratch"))
    ledger.end(saved)
    ledger.mark(Phase.STEP)
    ledger.mark(None)
    return logits


def test_ranks_on_cpu_hold_the_bytes_of_their_storages() -> None:
    ledger = Ledger()

    one, two = ledger.begin(100, WEIGHTS), ledger.begin(7, ACTIVATIONS)
    ledger.end(one)

    assert ledger.allocated_bytes() == 7
    assert ledger.take_phase_peak() == 107
    assert ledger.take_phase_peak() == 7
    assert list(ledger.live()) == [two]


def test_a_gpu_holds_blocks_and_the_difference_is_rounding() -> None:
    ledger = gpu_ledger()

    ledger.begin(100, WEIGHTS)
    ledger.begin(600, ACTIVATIONS)

    assert ledger.allocated_bytes() == 512 + 1024
    assert by_component(ledger.live()) == {
        Component.ACTIVATIONS: 600,
        Component.PARAMETERS: 100,
        Component.ROUNDING: 512 + 1024 - 700,
    }


def test_an_end_that_python_tells_during_an_allocation_is_entered_before_the_next_event() -> None:
    ledger = gpu_ledger()
    first = ledger.begin(MIB, WEIGHTS)

    ledger.end(first)
    ledger.end(first)  # told twice: by a repeated step, and by Python when the real storage goes
    second = ledger.begin(MIB, WEIGHTS)

    assert ledger.events == [1, -1, 2]
    assert ledger.allocated_bytes() == second.held
    assert ledger.reserved_bytes() == 2 * MIB


def test_the_peak_is_explained_by_what_is_alive_then() -> None:
    ledger = gpu_ledger()
    ledger.mark(Phase.INIT)
    ledger.end(ledger.begin(64 * MIB, WEIGHTS))  # the highest of all is in init, which is no training
    kept = ledger.begin(MIB, WEIGHTS)
    a_step(ledger, None)

    event = training_peak(ledger)
    items = items_at(ledger, event)

    assert kept.is_live
    assert {item.name: item.bytes for item in items} == {"gelu (forward)": 3 * MIB, "weights": MIB, "logits": MIB, "scratch": 100} | {
        "blocks rounded up by the allocator": 412
    }
    assert sum(item.bytes for item in items) == 5 * MIB + 512


def test_what_layers_allocated_is_told_by_layer_and_component() -> None:
    ledger = Ledger()
    ledger.begin(10, WEIGHTS)
    for ledger.layer in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn", "model.layers.10.mlp", "lm_head", ""):
        ledger.begin(8, ACTIVATIONS)
    ledger.layer = "lm_head"
    ledger.end(ledger.begin(8, ACTIVATIONS))
    ledger.begin(4, WEIGHTS)

    assert layers_at(ledger, ledger.now().events) == (
        LayerBytes("model.layers.0", Component.ACTIVATIONS, 16), LayerBytes("model.layers.10", Component.ACTIVATIONS, 8),
        LayerBytes("lm_head", Component.ACTIVATIONS, 8), LayerBytes("lm_head", Component.PARAMETERS, 4),
    )  # fmt: skip


def test_labels_of_those_who_hold_a_storage_replace_the_first_guess() -> None:
    ledger = Ledger()
    allocation = ledger.begin(8, ACTIVATIONS)

    ledger.relabel([(allocation, (Component.GRADIENTS, "parameter gradients"))])

    assert by_component(ledger.live()) == {Component.GRADIENTS: 8}


def test_a_timeline_says_what_each_event_leaves_and_where_phases_begin() -> None:
    ledger = Ledger()
    ledger.begin(10, WEIGHTS)
    a_step(ledger, None, activations=5)

    line = timeline(ledger, 0)

    assert line.events == (0, 1, 2, 3, 4, 5)
    assert line.components[Component.PARAMETERS] == (10,) * 6
    assert line.components[Component.ACTIVATIONS] == (0, 5, 5 + MIB, 5 + MIB, 5 + MIB, MIB)
    assert line.components[Component.WORKSPACE] == (0, 0, 0, 100, 0, 0)
    assert [(start.phase, start.event) for start in line.phases] == [(Phase.FORWARD, 0), (Phase.BACKWARD, 2), (Phase.STEP, 5)]
    assert [size for size, _ in line.changes] == [0, *(after - before for before, after in itertools.pairwise(line.totals))]


def test_a_timeline_names_what_each_event_allocates_and_in_which_layer() -> None:
    ledger = Ledger()
    ledger.begin_step()
    ledger.mark(Phase.FORWARD)
    ledger.layer = "model.layers.3.mlp"
    kept = ledger.begin(7, ACTIVATIONS)
    ledger.layer = ""
    ledger.touch(9, ACTIVATIONS)
    ledger.end(kept)
    ledger.mark(None)

    line = timeline(ledger, 0)

    named = [(size, line.names[name]) for size, name in line.changes]
    component, name = ACTIVATIONS
    outside = f"{component}: {name}"
    assert named[1:] == [(7, f"{outside}, model.layers.3.mlp"), (9, outside), (-9, outside), (-7, f"{outside}, model.layers.3.mlp")]
    thin = line.thinned(2)
    assert [(size, thin.names[name]) for size, name in thin.changes] == [named[1], named[2]], "the highest of neighbours"


def test_a_long_timeline_is_thinned_and_keeps_its_peak() -> None:
    ledger = Ledger()
    ledger.begin_step()
    ledger.mark(Phase.FORWARD)
    for size in [*range(1, 5001), 10**6, *range(5000)]:
        ledger.touch(size, ACTIVATIONS)
    ledger.mark(None)

    line = timeline(ledger, 0)

    assert len(line.events) == POINTS
    assert max(line.components[Component.ACTIVATIONS]) == 10**6


def test_a_step_is_repeated_with_the_storages_that_the_last_one_left() -> None:
    real, repeated = gpu_ledger(), gpu_ledger()
    carried: dict[Ledger, Allocation | None] = {}
    for ledger in (real, repeated):
        ledger.begin(100, WEIGHTS)
        carried[ledger] = a_step(ledger, a_step(ledger, None))

    for _ in range(3):
        carried[real] = a_step(real, carried[real])
        step = last_step(repeated)
        assert step is not None
        repeated.begin_step()
        for mark in repeat(repeated, step):
            repeated.mark(mark.phase)

    assert repeated.events == real.events
    assert repeated.marks == real.marks
    assert repeated.allocated_bytes() == real.allocated_bytes()
    assert repeated.reserved_bytes() == real.reserved_bytes()
    assert [a.label for a in repeated.live()] == [a.label for a in real.live()]


def test_a_step_that_leaves_more_than_it_found_is_not_repeated() -> None:
    ledger = Ledger()
    a_step(ledger, None)

    assert last_step(ledger) is None


def test_streams_and_stream_uses_are_repeated() -> None:
    ledger = gpu_ledger()
    for _ in range(2):
        ledger.begin_step()
        ledger.mark(Phase.FORWARD)
        ledger.stream = 1
        gathered = ledger.begin(3 * MIB, WEIGHTS)
        ledger.stream = 0
        ledger.use_on_stream(gathered, 0)
        ledger.end(gathered)
        ledger.mark(None)
    step = last_step(ledger)
    assert step is not None

    ledger.begin_step()
    for mark in repeat(ledger, step):
        ledger.mark(mark.phase)

    assert ledger.allocations[-1].stream == 1
    assert [use[2] for use in ledger.stream_uses] == [0, 0, 0]
    assert ledger.stream == 0


def test_the_first_request_without_room_is_written_down_and_the_run_goes_on() -> None:
    ledger = gpu_ledger(limit=30 * MIB)
    ledger.mark(Phase.INIT)
    ledger.begin(21 * MIB, WEIGHTS)
    ledger.begin_step()
    ledger.mark(Phase.BACKWARD)

    ledger.begin(11 * MIB, (Component.GRADIENTS, "parameter gradients"))
    ledger.begin(11 * MIB, ACTIVATIONS)

    verdict = ledger.out_of_memory
    assert verdict is not None
    assert (verdict.phase, verdict.step, verdict.tensor) == (Phase.BACKWARD, 0, "parameter gradients")
    assert (verdict.requested_bytes, verdict.limit_bytes) == (11 * MIB, 30 * MIB)
    assert verdict.reserved_bytes == 22 * MIB  # segments of 10 MiB and more are multiples of 2 MiB
    assert verdict.holders[Component.PARAMETERS] == 21 * MIB
    assert Component.ACTIVATIONS not in verdict.holders
    assert ledger.allocated_bytes() >= 43 * MIB


def test_pytorchs_visualiser_reads_the_snapshot(tmp_path: Path) -> None:
    viewer = pytest.importorskip("torch.cuda._memory_viz")
    ledger = gpu_ledger()
    ledger.keep_trace()
    ledger.begin(21 * MIB, WEIGHTS)
    ledger.end(ledger.begin(100, ACTIVATIONS))
    path = tmp_path / "snapshot.pickle"

    write_snapshot(path, ledger)
    with path.open("rb") as stream:
        read = pickle.load(stream)

    assert read == snapshot(ledger)
    assert "22.0MiB" in viewer.segsum(read)
    assert [entry["action"] for entry in read["device_traces"][0]] == ["segment_alloc", "alloc", "segment_alloc", "alloc"]
    ledger.allocated_bytes()
    assert [entry["action"] for entry in snapshot(ledger)["device_traces"][0]][4:] == ["free_requested", "free_completed"]
    assert sum(segment["allocated_size"] for segment in snapshot(ledger)["segments"]) == ledger.allocated_bytes()
    assert "weights" in read["device_traces"][0][1]["frames"][0]["name"]
    assert "alloc" in viewer.trace(read)
    assert "Active Memory Timeline" in viewer.trace_plot(read)
