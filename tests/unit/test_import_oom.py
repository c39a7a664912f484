"""torch's out-of-memory messages: every form, the rank, the phase by the traceback, and what they
prove."""

from __future__ import annotations

from pathlib import Path

import pytest
from logs import only, read, record, written
from pasted import BACKWARD, FORWARD, INIT, LOADING, NOTEBOOK, OLD_NOTEBOOK, OUT_OF_MEMORY, RICH, STEP, THROUGHPUT

from bf16prof.imports import out_of_memory
from bf16prof.imports.arithmetic import advice, room
from bf16prof.imports.finding import GIB, MIB
from bf16prof.imports.frames import SaidPhase
from bf16prof.imports.out_of_memory import _WRAPPED_LINES, OutOfMemoryReader, parse
from bf16prof.imports.text import LogLine
from bf16prof.records import OutOfMemory
from bf16prof.vocabulary import Phase

TAIL = "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
OLD = "Tried to allocate 512.00 MiB (GPU 0; 10.00 GiB total capacity; 6.00 GiB already allocated; 256.00 MiB free; "
NEW = "Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 10.00 GiB of which 256.00 MiB is free. "
HELD = f"Of the allocated memory 6.00 GiB is allocated by PyTorch, and 3.00 GiB is reserved by PyTorch but unallocated. {TAIL}"
PROCESSES = "Process 11 has 9.50 GiB memory in use. Process 12 has 254.00 MiB memory in use. "
POOLS = HELD.replace("by PyTorch, and", "by PyTorch, with 17.00 MiB allocated in private pools (e.g., CUDA Graphs), and")
FORMS = {
    "1.0": f"RuntimeError: CUDA out of memory. {OLD}3.00 GiB cached)",
    "1.9": f"RuntimeError: CUDA out of memory. {OLD}9.00 GiB reserved in total by PyTorch)",
    "2.0": f"torch.cuda.OutOfMemoryError: CUDA out of memory. {OLD}9.00 GiB reserved in total by PyTorch) If reserved memory is >> "
    "allocated memory try setting max_split_size_mb to avoid fragmentation.",
    "2.1, as it is spelt": f"torch.cuda.OutOfMemoryError: CUDA out of memory. {NEW.replace('capacity', 'capacty')}{HELD}",
    "2.5, processes": f"torch.OutOfMemoryError: CUDA out of memory. {NEW}{PROCESSES}{POOLS}",
    "ROCm": f"torch.OutOfMemoryError: HIP out of memory. {NEW}{HELD}",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same_numbers(text: str) -> None:
    message = parse(text)

    assert message is not None
    sizes = {name: message.bytes(name) for name in ("tried", "total", "free", "allocated", "reserved", "unallocated", "beside")}
    assert sizes == {
        "tried": 512 * MIB, "total": 10 * GIB, "free": 256 * MIB, "allocated": 6 * GIB, "reserved": 9 * GIB, "unallocated": 3 * GIB,
        "beside": 768 * MIB,
    }  # fmt: skip
    assert message.gpu == 0
    assert message.needed is not None
    assert message.needed.is_floor
    assert message.needed.bytes == 6 * GIB + 512 * MIB


def test_what_only_some_forms_say_is_read() -> None:
    message = parse(FORMS["2.5, processes"])
    limited = parse(FORMS["ROCm"].replace("256.00 MiB is free. ", "1.00 GiB is free. 9.25 GiB allowed; "))

    assert message is not None
    assert {pid: size.bytes for pid, size in message.processes.items()} == {11: 9728 * MIB, 12: 254 * MIB}
    assert limited is not None
    assert room(limited) == limited.bytes("allowed") == 9472 * MIB
    assert "has 9.00 GiB of the 9.25 GiB that it may have" in " ".join(advice(limited)), "less than is free"


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "except torch.cuda.OutOfMemoryError:",
        "Tried to allocate a lot",
        "out of memory: Killed process 12 (python)",
        "tried to allocate 2.00 GiB of shared memory, of which 1.00 GiB is free",
    ],
)
def test_what_is_no_message_is_none(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("text", ["RuntimeError: CUDA error: out of memory", "torch.OutOfMemoryError: CUDA out of memory."])
def test_a_message_without_numbers_still_says_how_the_run_ended(text: str, tmp_path: Path) -> None:
    sources = read(tmp_path, text)

    assert sources.failure == "out of memory"
    assert sources.findings[0].readings == {}
    assert sources.findings[0].shortage is None


def test_free_of_whole_bytes_and_of_a_message_that_begins_in_its_middle() -> None:
    message = parse(
        "Tried to allocate 20.00 MiB (GPU 0; 2.00 GiB total capacity; 1.25 GiB already allocated; 0 bytes free; 1.25 GiB cached)"
    )

    assert message is not None
    assert message.bytes("free") == 0


# The phase.


@pytest.mark.parametrize(
    ("traceback", "phase"),
    [
        (BACKWARD, Phase.BACKWARD),
        (FORWARD, Phase.FORWARD),
        (STEP, Phase.STEP),
        (INIT, Phase.INIT),
        (LOADING, Phase.INIT),
        (NOTEBOOK, Phase.INIT),
        (OLD_NOTEBOOK, Phase.BACKWARD),
        (RICH, Phase.STEP),
        ("", None),
    ],
)
@pytest.mark.parametrize("tag", ["", "[rank1]: ", "1: "])
def test_the_traceback_says_the_phase_and_the_tag_the_rank(traceback: str, phase: Phase | None, tag: str, tmp_path: Path) -> None:
    """Backward runs forward again under checkpointing, and init steps the optimizer: the outermost
    frame decides."""
    text = "\n".join(tag + line for line in (traceback + OUT_OF_MEMORY).splitlines())

    message = read(tmp_path, text).failed

    assert message is not None
    assert message.place.phase is phase
    assert message.rank == (1 if tag else None)
    assert bool(message.place.evidence) is (phase is not None)


def test_ranks_that_print_at_the_same_time_are_told_apart(tmp_path: Path) -> None:
    one, other = ([f"[rank{n}]: {line}" for line in (tb + OUT_OF_MEMORY).splitlines()] for n, tb in ((1, BACKWARD), (2, STEP)))
    other[-1] = other[-1].replace("19.00 GiB", "19.50 GiB")
    mixed = [line for pair in zip(one, other + [""] * len(one), strict=False) for line in pair] + other[len(one) :]

    sources = read(tmp_path, "\n".join(mixed))

    assert sources.failed is not None
    assert (sources.failed.rank, sources.failed.place.phase) == (2, Phase.STEP)
    assert "which needed most of 2" in " ".join(sources.findings[0].notes)


def test_a_rank_without_a_traceback_was_where_the_others_were(tmp_path: Path) -> None:
    more = OUT_OF_MEMORY.replace("19.00 GiB", "19.50 GiB")
    text = "\n".join([*(f"[rank1]: {line}" for line in (STEP + OUT_OF_MEMORY).splitlines()), f"[rank2]: {more}"])

    message = read(tmp_path, text).failed

    assert message is not None
    assert (message.rank, message.place.phase) == (2, Phase.STEP)
    assert "rank 1" in message.place.evidence


def test_what_is_said_of_how_a_job_died(tmp_path: Path) -> None:
    (alone,) = read(tmp_path, BACKWARD + OUT_OF_MEMORY).findings
    (of_two,) = read(
        tmp_path, "\n".join([OUT_OF_MEMORY, OUT_OF_MEMORY.replace("GPU 1", "GPU 2").replace("19.00 GiB", "19.50 GiB")])
    ).findings

    died = "out of memory on GPU 1 in backward (the traceback: loss.backward, `engine.backward(loss)`)"
    needs = "peaks are what was allocated then and what was asked for: the job needs at least so much"
    assert alone.failure == died
    assert alone.notes == tuple(f"{alone.format}: {note}" for note in (died, needs))
    assert of_two.notes[0] == f"{alone.format}: out of memory on GPU 2, which needed most of 2"


def test_a_message_says_no_rank_of_whose_traceback_is_known(tmp_path: Path) -> None:
    bare = "RuntimeError: CUDA error: out of memory"
    text = "\n".join([*(f"node-1: {line}" for line in (STEP + bare).splitlines()), f"node-2: {OUT_OF_MEMORY}"])

    message = read(tmp_path, text).failed

    assert message is not None
    assert message.place.phase is Phase.STEP
    assert message.place.evidence.startswith("another rank: the traceback: ")


def test_so_many_messages_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "MOST", 2)
    reader = OutOfMemoryReader()
    for rank in range(4):
        reader.line(LogLine(OUT_OF_MEMORY, f"rank {rank}"))

    assert [each.rank for each in reader.messages] == [0, 1]


def test_without_a_traceback_the_log_says_what_had_begun(tmp_path: Path) -> None:
    usage = "Engine before backward\nMA 2.0 GB         Max_MA 3.0 GB         CA 4.0 GB         Max_CA 4 GB\n"

    message = read(tmp_path, usage + OUT_OF_MEMORY).failed

    assert message is not None
    assert message.place.phase is Phase.BACKWARD
    assert "the log" in message.place.evidence


# What is proved.


def test_a_message_proves_lower_bounds_and_the_numbers_are_in_the_record(tmp_path: Path) -> None:
    found = record(written(tmp_path, BACKWARD + OUT_OF_MEMORY))

    assert set(found.at_least) == {
        "run_peak_allocated_bytes", "peak_allocated_bytes", "phases.backward.peak_bytes", "reserved_bytes", "device_bytes",
    }  # fmt: skip
    assert found.run_peak_allocated_bytes == found.phases[Phase.BACKWARD].peak_bytes == 21 * GIB
    assert found.reserved_bytes == 21.25 * GIB
    assert found.device_bytes == 22 * GIB
    assert found.out_of_memory is not None
    assert (found.out_of_memory.requested_bytes, found.out_of_memory.limit_bytes) == (2 * GIB, 22.75 * GIB)
    assert (found.out_of_memory.total_bytes, found.out_of_memory.free_bytes) == (23.5 * GIB, 1.5 * GIB)
    assert found.out_of_memory.phase is Phase.BACKWARD


def test_the_numbers_of_a_message_are_all_kept() -> None:
    message = parse(OUT_OF_MEMORY, rank=5, place=SaidPhase(Phase.STEP))
    assert message is not None
    assert message.shortage() == OutOfMemory(
        phase=Phase.STEP, step=None, tensor="", requested_bytes=2 * GIB, allocated_bytes=19 * GIB, reserved_bytes=round(21.25 * GIB),
        limit_bytes=round(22.75 * GIB), holders={}, free_bytes=round(1.5 * GIB), total_bytes=round(23.5 * GIB), rank=5,
    )  # fmt: skip


def test_what_the_allocator_may_have_is_the_limit() -> None:
    allowed = parse(OUT_OF_MEMORY.replace("Of the allocated memory", "22.00 GiB allowed; Of the allocated memory"))
    assert allowed is not None
    shortage = allowed.shortage()
    assert shortage is not None
    assert shortage.limit_bytes == 22 * GIB


def test_numbers_that_follow_from_others_are_as_uncertain_as_both() -> None:
    """Printed with two decimals of a GiB, each may be 0.005 GiB off."""
    message, older = parse(OUT_OF_MEMORY), parse(f"CUDA out of memory. {OLD}9.00 GiB reserved in total by PyTorch)")
    assert message is not None
    assert older is not None
    half = message.sizes["allocated"].rounding
    assert half == pytest.approx(0.005 * GIB, abs=1)
    assert (message.sizes["reserved"].rounding, message.sizes["beside"].rounding) == (2 * half, 4 * half)
    assert (older.bytes("unallocated"), older.sizes["unallocated"].rounding) == (3 * GIB, 2 * half)
    assert older.sizes["reserved"].rounding == half


def test_what_stands_before_the_message_is_not_of_it() -> None:
    message = parse(f"before: GPU 7 has a total capacity of 1.00 GiB. CUDA out of memory. {NEW}{HELD}")
    assert message is not None
    assert (message.gpu, message.bytes("total")) == (0, 10 * GIB)


@pytest.mark.parametrize("text", [f"Tried to allocate 2.00 GiB. {HELD}", NEW.replace("Tried to allocate 512.00 MiB. ", "")])
def test_half_a_message_is_none(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("speakers", "kept"), [(["rank 0", "rank 1", "rank 0", "", "rank 1"], [0, 1]), (["", ""], [None]), (["", "rank 2"], [None, 2])]
)
def test_the_same_message_counts_once_for_each_rank(speakers: list[str], kept: list[int | None]) -> None:
    reader = OutOfMemoryReader()
    for speaker in speakers:
        reader.line(LogLine(OUT_OF_MEMORY, speaker))
    assert [each.rank for each in reader.messages] == kept


def test_messages_of_other_numbers_or_gpus_are_others() -> None:
    reader = OutOfMemoryReader()
    for text in (OUT_OF_MEMORY, OUT_OF_MEMORY.replace("2.25 GiB", "2.26 GiB"), OUT_OF_MEMORY.replace("GPU 1", "GPU 2")):
        reader.line(LogLine(text))
    assert len(reader.messages) == 3


@pytest.mark.parametrize(
    "missing", ["Tried to allocate 2.00 GiB. ", "19.00 GiB is allocated by PyTorch, and ", "2.25 GiB is reserved by PyTorch"]
)
def test_a_message_without_its_numbers_is_no_shortage(missing: str) -> None:
    message = parse(OUT_OF_MEMORY.replace(missing, ""))
    assert message is not None
    assert message.shortage() is None


def test_what_a_message_leaves_out_is_not_made_up() -> None:
    """Without what is free, the limit is what was reserved; of a whole device without what is free,
    nothing is said."""
    reader = OutOfMemoryReader()
    reader.line(LogLine(OUT_OF_MEMORY.replace(" of which 1.50 GiB is free", "").replace("2.25 GiB", "0 bytes")))

    finding = reader.finding()

    assert finding is not None
    assert finding.shortage is not None
    assert finding.shortage.limit_bytes == finding.shortage.reserved_bytes == 19 * GIB
    assert finding.shortage.free_bytes is None
    assert "device_bytes" not in finding.readings


def test_what_is_reserved_is_allocated_to_the_last_byte() -> None:
    message = parse(f"CUDA out of memory. {OLD}6.00 GiB reserved in total by PyTorch)")

    assert message is not None
    assert message.bytes("unallocated") == 0


def test_peaks_before_the_end_are_lower_bounds_as_well(tmp_path: Path) -> None:
    """The throughput timer saw 18.3 GB until step 20; then the run asked for 21."""
    found = record(written(tmp_path, THROUGHPUT + OUT_OF_MEMORY))

    assert found.run_peak_allocated_bytes == 21 * GIB
    assert "run_peak_allocated_bytes" in found.at_least
    assert "allocated_bytes" not in found.at_least, "between steps it is what it was"
    assert not [note for note in found.notes if "contradict" in note]


@pytest.mark.parametrize("first", range(1, 9))
def test_a_message_that_was_broken_into_lines_is_read(first: int, tmp_path: Path) -> None:
    """Wherever: also between a number and its unit."""
    words = ["torch.OutOfMemoryError: CUDA out of memory.", *["and"] * first, *OUT_OF_MEMORY.split(" ")[5:]]
    broken = "\n".join(" ".join(words[n : n + 8]) for n in range(0, len(words), 8))

    assert record(written(tmp_path, broken)).run_peak_allocated_bytes == 21 * GIB


BEGUN = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a"
"""What is left of a message when its first line is broken off."""


@pytest.mark.parametrize("ending", ['  File "train.py", line 7, in <module>', "Traceback (most recent call last):", OUT_OF_MEMORY])
def test_a_message_that_lacks_its_end_is_over_where_something_else_begins(ending: str) -> None:
    reader, alone = OutOfMemoryReader(), OutOfMemoryReader()
    texts = (BEGUN, "total capacity of 23.50", "GiB of which 1.50 GiB is free.", "?", ending)

    taken = [reader.line(LogLine(text, "rank 3")) for text in texts]

    assert taken == [1, 0, 1, 0, alone.line(LogLine(ending, "rank 3"))]
    first, *others = reader.messages
    assert (first.bytes("tried"), first.bytes("total")) == (2 * GIB, 23.5 * GIB)
    assert (first.gpu, first.rank) == (1, 3)
    assert [each.sizes for each in others] == [each.sizes for each in alone.messages]


def test_a_message_ends_after_so_many_lines() -> None:
    reader = OutOfMemoryReader()
    taken = [reader.line(LogLine(text)) for text in (BEGUN, *["?"] * (_WRAPPED_LINES - 1))]
    assert (sum(taken), reader.messages) == (1, [])

    assert reader.line(LogLine("of which 1.50 GiB is free. 2.25 GiB is reserved by PyTorch but unallocated.")) == 1, (
        "the last that may belong to it"
    )
    (message,) = reader.messages
    assert message.bytes("unallocated") == 2.25 * GIB

    reader = OutOfMemoryReader()
    assert sum(reader.line(LogLine(text)) for text in (BEGUN, *["?"] * _WRAPPED_LINES)) == 1
    (message,) = reader.messages
    assert message.bytes("tried") == 2 * GIB
    assert reader.line(LogLine("2.25 GiB is reserved by PyTorch but unallocated.")) == 0


def test_each_rank_breaks_its_own_message() -> None:
    reader = OutOfMemoryReader()
    end = "total capacity of 23.50 GiB of which 1.50 GiB is free. 2.25 GiB is reserved by PyTorch but unallocated."
    taken = [reader.line(LogLine(text, speaker)) for text in (BEGUN, end) for speaker in ("rank 0", "rank 1")]
    assert taken == [1, 1, 1, 1]
    assert [(each.rank, each.bytes("unallocated")) for each in reader.messages] == [(0, 2.25 * GIB), (1, 2.25 * GIB)]


def test_what_a_launcher_repeats_is_said_once(tmp_path: Path) -> None:
    finding = only(tmp_path, f"[rank1]: {OUT_OF_MEMORY}\nroot cause:\n  message : {OUT_OF_MEMORY}\n")

    assert "needed most of" not in " ".join(finding.notes)


# The arithmetic.


def test_fragmentation_is_told_from_want() -> None:
    fragmented, wanting = (
        parse(OUT_OF_MEMORY),
        parse(OUT_OF_MEMORY.replace("2.25 GiB", "0.25 GiB").replace("Tried to allocate 2.00", "Tried to allocate 4.00")),
    )

    assert fragmented is not None
    assert wanting is not None
    assert "without fragmentation there would be room" in " ".join(advice(fragmented))
    assert "fragmentation is not the cause: without it 2.25 GiB would still be missing" in " ".join(advice(wanting)), "4 - 0.25 - 1.5"


def test_other_processes_are_seen_where_the_message_tells_them_apart() -> None:
    crowded = parse(OUT_OF_MEMORY.replace("22.00 GiB memory in use", "21.50 GiB memory in use"))

    assert crowded is not None
    assert "512.00 MiB is used by other processes" in " ".join(advice(crowded))
    assert "processes" not in " ".join(advice(parse(OUT_OF_MEMORY) or crowded))


def test_the_contexts_of_other_ranks_on_one_gpu_are_seen() -> None:
    """Of several processes the one that can hold what is reserved is this one."""
    text = OUT_OF_MEMORY.replace(
        "Including non-PyTorch memory, this process has 22.00 GiB memory in use.",
        "Process 1 has 400.00 MiB memory in use. Process 2 has 21.60 GiB memory in use.",
    )
    message = parse(text)

    assert message is not None
    assert "409.60 MiB is used by other processes" in " ".join(advice(message))


def test_more_than_the_gpu_has_is_the_hosts_memory() -> None:
    lent = parse(OUT_OF_MEMORY.replace("23.50 GiB", "8.00 GiB").replace("1.50 GiB", "0 bytes"))

    assert lent is not None
    assert "lends host memory" in " ".join(advice(lent))


def test_a_speaker_too_many_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "MOST", 1)
    monkeypatch.setattr(out_of_memory, "PATIENCE", 3)
    reader = OutOfMemoryReader()
    begun = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    for line in [LogLine("word", "rank0"), LogLine(begun, "rank1"), *[LogLine("word", "rank0")] * 5]:
        reader.line(line)

    assert not reader.is_open
    assert len(reader.messages) == 1
