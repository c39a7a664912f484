"""The ledger of a dry run: what is alive, what it is for, and when; steps done again on the
allocator's side; the snapshot."""

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
from bf16prof.records import Item, LayerBytes
from bf16prof.vocabulary import ROUNDED, Component, Phase

MIB = 2**20
WEIGHTS = (Component.PARAMETERS, "weights")
ACTIVATIONS = (Component.ACTIVATIONS, "gelu (forward)")


def gpu_ledger(limit: int | None = None) -> Ledger:
    return Ledger(CachingAllocator(limit))


def a_step(ledger: Ledger, carried: Allocation | None, activations: int = 3 * MIB) -> Allocation:
    """One optimizer step: what the last one left is replaced, something is allocated and freed in
    forward and backward."""
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


def test_a_storage_ends_once_and_does_not_keep_others_from_it() -> None:
    ledger = gpu_ledger()
    one, two = ledger.begin(100, WEIGHTS), ledger.begin(7, ACTIVATIONS)
    for each in (one, one, two):
        ledger.end(each)

    assert ledger.allocated_bytes() == 0
    assert ledger.events == [1, 2, -1, -2]


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


def test_the_peak_of_training_is_the_first_highest_from_the_first_forward_pass_on_without_init() -> None:
    ledger = Ledger()
    early = ledger.begin(1000, WEIGHTS)
    ledger.mark(Phase.FORWARD)  # after event 1
    ledger.end(early)  # 2
    one, two = ledger.begin(30, ACTIVATIONS), ledger.begin(20, ACTIVATIONS)  # 3 and 4: 50
    ledger.mark(Phase.BACKWARD)
    ledger.end(one)  # 5
    ledger.end(ledger.begin(30, ACTIVATIONS))  # 6 and 7: 50 again
    ledger.mark(Phase.INIT)  # a script builds another engine
    ledger.end(ledger.begin(500, WEIGHTS))  # 8 and 9
    ledger.mark(Phase.FORWARD)
    ledger.end(two)  # 10
    ledger.now()

    assert training_peak(ledger) == 4


def test_all_of_another_engines_init_is_left_out() -> None:
    ledger = Ledger()
    ledger.mark(Phase.FORWARD)
    for size in (1, 1, 70):  # events 1 to 3, of which the last is large
        ledger.begin(size, ACTIVATIONS)
    ledger.mark(Phase.INIT)
    built = [ledger.begin(500, WEIGHTS) for _ in range(3)]
    for each in built:
        ledger.end(each)
    ledger.mark(Phase.BACKWARD)
    ledger.begin(2, ACTIVATIONS)

    assert training_peak(ledger) == len(ledger.events) == 10
    assert [mark.event for mark in ledger.marks] == [0, 3, 9]


def test_one_large_storage_is_more_than_two_small_ones() -> None:
    ledger = Ledger()
    ledger.mark(Phase.FORWARD)
    ledger.end(ledger.begin(70, ACTIVATIONS))
    ledger.begin(1, ACTIVATIONS)
    ledger.begin(1, ACTIVATIONS)

    assert training_peak(ledger) == 1


def test_without_anything_allocated_there_is_no_event_of_the_peak() -> None:
    ledger = Ledger()
    ledger.mark(Phase.FORWARD)

    assert training_peak(ledger) == 0


def test_items_are_added_up_by_name_and_told_biggest_first() -> None:
    ledger = gpu_ledger()
    for size, label in ((100, WEIGHTS), (3000, ACTIVATIONS), (200, WEIGHTS)):
        ledger.begin(size, label)
    ledger.begin(5000, WEIGHTS)  # after the event that is asked for

    assert items_at(ledger, 3) == (
        Item(*ACTIVATIONS, 3000, "simulated"),
        Item(*ROUNDED, (512 - 100) + (3072 - 3000) + (512 - 200), "simulated"),
        Item(*WEIGHTS, 300, "simulated"),
    )


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

    assert layers_at(ledger, 2) == (LayerBytes("model.layers.0", Component.ACTIVATIONS, 8),)
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


def test_a_timeline_is_of_one_step_and_has_the_rounding_of_the_allocator() -> None:
    ledger = gpu_ledger()
    ledger.begin(100, WEIGHTS)
    for _ in range(3):
        ledger.begin_step()
        for phase in (Phase.FORWARD, None, Phase.EVAL, Phase.EVAL, None):  # two batches of an evaluation
            ledger.mark(phase)
            ledger.touch(300, ACTIVATIONS)

    line = timeline(ledger, 1)

    assert line.events == tuple(range(11))
    assert line.components == {
        Component.PARAMETERS: (100,) * 11,
        Component.ACTIVATIONS: (0, *(300, 0) * 5),
        Component.ROUNDING: (412, *(412 + 212, 412) * 5),
    }
    assert [(start.phase, start.event) for start in line.phases] == [(Phase.FORWARD, 0), (Phase.EVAL, 4)]


def test_components_are_added_up_and_told_biggest_first() -> None:
    ledger = gpu_ledger()
    assert ledger.begin(100, WEIGHTS).layer == ""
    for size, label in ((1500, ACTIVATIONS), (200, (Component.PARAMETERS, "bias"))):
        ledger.begin(size, label)

    sizes = by_component(ledger.live())
    rounding = (512 - 100) + (1536 - 1500) + (512 - 200)
    assert list(sizes.items()) == [(Component.ACTIVATIONS, 1500), (Component.ROUNDING, rounding), (Component.PARAMETERS, 300)]
    assert ledger.out_of_memory is None


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
    ledger.mark(Phase.FORWARD)
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


def test_what_is_allocated_in_a_row_takes_one_block_of_each_segment() -> None:
    """Five storages of 600,000 bytes: blocks of 512 bytes x 1172, three to a segment of 2 MiB. The
    fourth needed the second segment."""
    ledger = gpu_ledger()

    row = ledger.begin(600_000, WEIGHTS, count=5)

    assert [block.requested for block in row.blocks] == [3 * 600_000, 2 * 600_000]
    assert repr((row.bytes, row.held)) == repr((5 * 600_000, 5 * 512 * 1172))
    assert ledger.peak_reserved == ledger.open_peak_reserved == 4 * MIB
    assert ledger.allocated_at_peak_reserved == 4 * 512 * 1172
    ledger.begin(100_000, WEIGHTS)  # what is left of the first segment is enough
    assert ledger.allocated_at_peak_reserved == 4 * 512 * 1172
    assert ledger.begin(0, WEIGHTS, count=3).held == 0


def test_a_block_that_is_not_split_counts_whole_where_it_needed_the_memory() -> None:
    """21 MiB in a segment of 22: no more than 1 MiB would be left, which is not split off."""
    ledger = gpu_ledger()

    ledger.begin(21 * MIB, WEIGHTS)

    assert ledger.peak_reserved == ledger.allocated_at_peak_reserved == 22 * MIB


def test_each_stream_has_segments_of_its_own() -> None:
    ledger = gpu_ledger()
    ledger.keep_trace()
    ledger.begin(100, WEIGHTS)
    ledger.stream = 1
    ledger.begin(100, WEIGHTS)

    assert ledger.reserved_bytes() == 4 * MIB
    assert [entry.stream for entry in ledger.trace] == [0, 0, 1, 1]


def test_what_another_stream_uses_is_free_after_it_only() -> None:
    ledger = gpu_ledger()
    ledger.keep_trace()
    alone, used = ledger.begin(MIB, WEIGHTS), ledger.begin(MIB, ACTIVATIONS)
    ledger.use_on_stream(alone, 0)  # its own
    ledger.use_on_stream(used, 1)

    ledger.end(alone)
    ledger.now()
    assert [entry.action for entry in ledger.trace][-2:] == ["free_requested", "free_completed"]
    ledger.end(used)
    ledger.now()
    assert [entry.action for entry in ledger.trace][-1] == "free_requested"
    ledger.synchronize()
    assert [entry.action for entry in ledger.trace][-1] == "free_completed"

    ledger.use_on_stream(used, 1)  # it has no block any more
    assert [(index, stream) for _, index, stream in ledger.stream_uses] == [(0, 0), (1, 1)]


def test_the_cache_can_be_emptied_and_that_is_counted() -> None:
    for ledger, kept in ((gpu_ledger(), 2 * MIB), (Ledger(), 0)):
        ledger.end(ledger.begin(MIB, WEIGHTS))
        assert ledger.reserved_bytes() == kept

        ledger.empty_cache()
        ledger.empty_cache()
        ledger.synchronize()

        assert ledger.reserved_bytes() == 0
        assert ledger.emptied == 2


def test_a_scripts_own_counters_of_peaks_start_again() -> None:
    for ledger, (before, after), reserved in ((gpu_ledger(), (1024, 512), 2 * MIB), (Ledger(), (107, 7), 7)):
        ledger.end(ledger.begin(100, WEIGHTS))
        one = ledger.begin(100, WEIGHTS)
        ledger.begin(7, ACTIVATIONS)
        ledger.end(one)
        assert ledger.open_peak == before

        ledger.reset_open_peaks()

        assert (ledger.open_peak, ledger.open_peak_reserved) == (after, reserved)


def test_a_row_on_cpu_holds_all_of_its_storages_and_nothing_has_been_held_before() -> None:
    ledger = Ledger()
    assert ledger.peak_reserved == ledger.allocated_at_peak_reserved == ledger.open_peak == ledger.open_peak_reserved == 0

    assert ledger.begin(7, WEIGHTS, count=3).held == ledger.allocated_bytes() == 21


def test_what_is_said_of_a_storage_is_said_of_the_one_that_took_its_place() -> None:
    ledger = Ledger()
    old, new = ledger.begin(10, WEIGHTS), ledger.begin(20, WEIGHTS)
    ledger.succeed(old, new)
    ledger.succeed(new, new)  # it stays

    ledger.relabel([(old, ACTIVATIONS)])
    assert (old.label, new.label) == (WEIGHTS, ACTIVATIONS)
    ledger.end(old)
    assert ledger.allocated_bytes() == 10
    assert list(ledger.live()) == [old]


def test_somebody_hears_how_far_a_run_has_come() -> None:
    ledger, heard = Ledger(), []
    ledger.on_tick = lambda: heard.append(len(ledger.allocations))

    for _ in range(600):
        ledger.touch(1, ACTIVATIONS)

    assert heard == [1, 257, 513]


def test_running_out_of_memory_before_any_phase_is_in_init_and_the_rest_of_a_row_is_found() -> None:
    ledger = gpu_ledger(limit=2 * MIB)
    ledger.stream = 3
    held = ledger.begin(100, ACTIVATIONS)
    ledger.before_verdict = lambda: ledger.relabel([(held, WEIGHTS)])

    row = ledger.begin(600_000, ACTIVATIONS, count=5)

    verdict = ledger.out_of_memory
    assert verdict is not None
    assert (verdict.phase, verdict.step, verdict.requested_bytes) == (Phase.INIT, None, 600_000)
    assert (verdict.limit_bytes, verdict.tensor) == (2 * MIB, ACTIVATIONS[1])
    assert (verdict.allocated_bytes, verdict.reserved_bytes) == (512 + 3 * 512 * 1172, 2 * MIB)
    assert verdict.holders == {Component.ACTIVATIONS: 1_800_000, Component.ROUNDING: 412 + 192, Component.PARAMETERS: 100}
    assert [(block.requested, block.stream) for block in row.blocks] == [(3 * 600_000, 3), (2 * 600_000, 3)]


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
