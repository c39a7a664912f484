"""Memory snapshots: plain pickles and no others, exact where the allocator is, and a lower bound
where its events do not say more."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import only, read

from bf16prof.allocator import CachingAllocator
from bf16prof.dry_run.ledger import Allocation, Ledger
from bf16prof.dry_run.snapshot import snapshot as written_snapshot
from bf16prof.errors import InputError
from bf16prof.imports import plain_pickle
from bf16prof.imports.finding import Reading
from bf16prof.imports.plain_pickle import load
from bf16prof.imports.snapshot import SnapshotReader
from bf16prof.vocabulary import Component

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
PLAIN = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner) | st.tuples(inner))


# The unpickler.


@settings(deadline=None)
@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_comes_back_as_it_was(value: Any, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol)) == pickle.loads(pickle.dumps(value, protocol)) == value


def test_what_is_there_twice_is_built_once() -> None:
    shared: list[Any] = ["frame"]

    one, other = load(pickle.dumps([shared, shared]))

    assert one is other


class Calls:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch called",)


class Builds:
    def __init__(self) -> None:
        self.state = 1


NOT_PLAIN = [Calls(), Builds(), {"a": [Calls()]}, os.system, object, b"bytes", {1, 2}, 1j, frozenset(), Path("x")]


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_else_is_built_and_nothing_is_called(value: Any, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="plain data needs no such thing"):
        load(pickle.dumps(value, protocol))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",  # STACK_GLOBAL, REDUCE
        b"\x80\x02cos\nsystem\nq\x00(U\x02idtR.",  # GLOBAL
        b"\x80\x02(ios\nsystem\n.",  # INST
        b"\x80\x02(cos\nsystem\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02}}b.",  # BUILD
        b"\x80\x02Pid\n.",  # PERSID
        b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of 2**63 bytes
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x00x.",
        b"\x80\x02S'\\x8'\n.",
        b"\x80\x02L" + b"9" * 10_000 + b"L\n.",
        b"\x80\x04h\x05.", b"\x80\x04.", b"\x80\x04(.", b"\x80\x04]e.", b"\x80\x04K\x01a.", b"\x80\x04]]u.",
        b"\x80\x04}K\x01(K\x02e.", b"\x80\x04}]Ks.",
        b"\x80\x04(\x85.", b"\x80\x04](\x61.", b"\x80\x04K\x01K\x02.", b"\x80", b"\x80\x04", b"\x80\x04\xff.",
    ],
)  # fmt: skip
def test_a_pickle_that_is_no_plain_data_or_does_not_fit_together_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        load(content)


def test_a_place_in_the_memo_costs_no_more_than_itself() -> None:
    assert load(b"\x80\x04}r\xff\xff\xff\x7f.") == {}


def test_endless_nesting_is_neither_recursed_into_nor_hashed() -> None:
    depth = 200_000

    deep = load(b"\x80\x04)" + b"\x85" * depth + b".")
    with pytest.raises(ValueError, match="SETITEM"):
        load(b"\x80\x04})" + b"\x85" * depth + b"Ns.")

    assert isinstance(deep, tuple)


def test_keys_whose_hashes_can_be_chosen_are_refused() -> None:
    with pytest.raises(ValueError, match="SETITEMS, does not fit"):
        load(pickle.dumps(dict.fromkeys(number * (2**61 - 1) for number in range(9))))


@pytest.mark.parametrize("what", ["segments", "device_traces"])
def test_a_small_file_does_not_unfold_to_endless_lists(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bf16prof.imports.snapshot.MOST_ENTRIES", 1000)
    blocks: list[Any] = [{"size": 512, "state": "active_allocated"}] * 100
    content = {
        "segments": [{"blocks": blocks, "total_size": 512, "allocated_size": 512, "address": 0}] * 11 if what == "segments" else [],
        "device_traces": [[{"action": "alloc", "addr": 0, "size": 512}] * 100] * 11 if what == "device_traces" else [],
    }
    with pytest.raises(InputError, match="more than 1,000 blocks and events"):
        read(tmp_path, pickle.dumps(content))


def test_the_number_of_operations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MOST_OPERATIONS", 1000)

    with pytest.raises(ValueError, match="more than 1,000 operations"):
        load(b"\x80\x04" + b"]" * 2000 + b".")


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_plain_data_or_a_value_error(content: bytes) -> None:
    try:
        load(b"\x80\x04" + content)
    except ValueError as error:
        assert str(error)


# Snapshots.


def block(address: int, size: int, state: str = "active_allocated", frames: Any = ()) -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": size - 1, "state": state, "frames": list(frames)}


def segment(*blocks: dict[str, Any], device: int = 0) -> dict[str, Any]:
    alive = [b["size"] for b in blocks if b["state"] == "active_allocated"]
    return {
        "device": device, "address": blocks[0]["address"], "total_size": sum(b["size"] for b in blocks), "allocated_size": sum(alive),
        "active_size": sum(alive), "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0), "blocks": list(blocks),
    }  # fmt: skip


def event(action: str, address: int, size: int) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 1, "frames": []}


def snapshot(segments: list[Any], *traces: list[Any]) -> bytes:
    return pickle.dumps({"segments": segments, "device_traces": list(traces)})


FRAMES = [
    {"name": "empty", "filename": "??", "line": 0},
    {"name": "linear", "filename": "/lib/python/torch/nn/functional.py", "line": 7},
    {"name": "forward", "filename": "/home/me/model.py", "line": 12},
]


def test_blocks_are_exact_and_earlier_moments_are_a_lower_bound(tmp_path: Path) -> None:
    trace = [
        event("segment_alloc", 0, 4096), event("alloc", 0, 1000),
        event("segment_alloc", 8192, 2048), event("alloc", 8192, 2000), event("free_requested", 8192, 2000),
        event("free_completed", 8192, 2000), event("segment_free", 8192, 2048), event("alloc", 2048, 500),
    ]  # fmt: skip
    segments = [segment(block(0, 2048, frames=FRAMES), block(2048, 512), block(2560, 1536, "inactive"))]

    finding = only(tmp_path, snapshot(segments, trace))

    assert finding.readings == {
        "allocated_bytes": Reading(2560),
        "reserved_bytes": Reading(6144),
        "run_peak_allocated_bytes": Reading(2048 + 2048, is_floor=True),
    }, "the first block has 2,048 bytes, of which 1,000 were asked for; the second is gone and had 2,048 at least"
    assert [(item.name, item.bytes) for item in finding.items] == [("forward (model.py:12)", 2048), ("unknown place", 512)]
    assert "8 events, from the first allocation on; the peak is a lower bound" in " ".join(finding.notes)


def test_a_trace_that_begins_later_knows_no_peak_of_the_whole_run(tmp_path: Path) -> None:
    trace = [event("free_requested", 512, 300), event("free_completed", 512, 300)]

    finding = only(tmp_path, snapshot([segment(block(0, 512), block(512, 512, "inactive"))], trace))

    assert finding.readings["peak_allocated_bytes"] == Reading(1024, is_floor=True)
    assert "run_peak_allocated_bytes" not in finding.readings


def test_without_events_there_is_no_peak(tmp_path: Path) -> None:
    finding = only(tmp_path, snapshot([segment(block(0, 512))], []))

    assert finding.readings == {"allocated_bytes": Reading(512), "reserved_bytes": Reading(512)}


def test_of_several_devices_and_ranks_the_one_that_holds_most_counts(tmp_path: Path) -> None:
    first = snapshot([segment(block(0, 512)), segment(block(0, 2048), device=1)], [], [])

    finding = only(tmp_path, first, snapshot([segment(block(0, 1024))], []))

    assert finding.readings["allocated_bytes"] == Reading(2048)
    assert "of the one of 3 devices that holds most" in " ".join(finding.notes)


def test_running_out_of_memory_and_unknown_events_are_said(tmp_path: Path) -> None:
    oom = {"action": "oom", "device_free": 1, "size": 4096, "stream": 0, "frames": []}

    sources = read(tmp_path, snapshot([segment(block(0, 512))], [oom, event("teleport", 0, 1)]))

    assert "ran out of memory 1 times, the last time for 4,096 bytes" in " ".join(sources.findings[0].notes)
    assert sources.files[0].rest == 1


KEYS = ["segments", "device_traces", "blocks", "action", "size", "addr", "address", "total_size", "frames", "state", "name"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * 2**20)), min_size=1, max_size=60))
def test_a_snapshot_of_a_modelled_allocator_says_what_the_allocator_says(moves: list[tuple[bool, int]]) -> None:
    """The dry run writes snapshots that PyTorch's own visualiser reads (see `test_ledger.py`)."""
    ledger = Ledger(CachingAllocator(None))
    ledger.keep_trace()
    alive: list[tuple[Allocation, int]] = []
    least = 0
    for frees, size in moves:
        if frees and alive:
            ledger.end(alive.pop(size % len(alive))[0])
        else:
            alive.append((ledger.begin(size, (Component.OTHER, "x")), -(-size // 512) * 512))
        least = max(least, sum(blocks for _, blocks in alive))
    allocated, peak, reserved = ledger.allocated_bytes(), ledger.take_phase_peak(), ledger.reserved_bytes()
    reader = SnapshotReader()

    reader.read(load(pickle.dumps(written_snapshot(ledger), 4)))
    finding = reader.finding()

    assert finding is not None
    readings = finding.readings
    assert readings["allocated_bytes"] == Reading(allocated)
    assert readings["reserved_bytes"] == Reading(reserved), "nothing was given back, so this is the most"
    assert max(allocated, least) <= readings["run_peak_allocated_bytes"].bytes <= peak, "complete from the first allocation on"


JUNK = st.recursive(
    st.none() | st.integers(-5, 2**70) | st.text(max_size=5) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner | st.sampled_from(["alloc", "oom", "active_allocated", 0, 512]),
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(JUNK, JUNK)
def test_any_plain_data_is_a_snapshot_or_a_value_error(segments: Any, traces: Any) -> None:
    reader = SnapshotReader()
    try:
        reader.read({"segments": segments, "device_traces": traces})
        reader.finding()
    except ValueError as error:
        assert str(error)


def test_a_frame_that_is_a_bomb_is_not_printed(tmp_path: Path) -> None:
    bomb: Any = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]

    finding = only(tmp_path, snapshot([segment(block(0, 512, frames=[{"name": bomb, "filename": bomb, "line": bomb}]))], []))

    assert [item.name for item in finding.items] == ["unknown place"]


@pytest.mark.parametrize(
    "content", [pickle.dumps([]), pickle.dumps({}), snapshot([{"total_size": -1}], []), snapshot([{}], []), pickle.dumps(Calls())]
)
def test_what_is_no_snapshot_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)

    assert str(tmp_path / "log0") in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
