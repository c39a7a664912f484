"""Files that are no logs, or are made to harm: one line and exit code 2, nothing run, nothing
printed raw."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs import BREAKDOWN, EXAMPLE, LOSSES, SAMPLES, written
from pasted import BACKWARD, ENDS_IN_INIT, MICRO_STEPS, OUT_OF_MEMORY, SMI_TABLE, THROUGHPUT, TRAINER

import bf16prof.files
from bf16prof.documents import document
from bf16prof.errors import InputError
from bf16prof.files import write_json
from bf16prof.imports import files
from bf16prof.imports.files import read_files
from bf16prof.imports.record import imported_record
from bf16prof.records import Case
from bf16prof.runs import load_records

PASTED = (THROUGHPUT, BACKWARD + OUT_OF_MEMORY, TRAINER, SMI_TABLE, MICRO_STEPS, ENDS_IN_INIT)
REAL = [text.encode() for text in (EXAMPLE.read_text(), BREAKDOWN.read_text()[:3000], LOSSES, SAMPLES, *PASTED)]
CASE = Case("p", 3, 4, "fp32")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\n\n  \n", "empty"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "binary"),
        ("SUMMARY: config=a params=1".encode("utf-16"), "none of its 1 lines"),
        ("a\0b".encode("utf-16"), "binary"),
        (b"\x1f\x8b\x08" + b"a" * 50, "cannot be unpacked"),
        (b"[" * 100_000, "none of its 1 lines"),
        (b'{"a":' * 100_000, "none of its 1 lines"),
        (b"{'loss': '" + b"9" * 3000 + b"'}", "none of its 1 lines"),
        (b"MemAllocated=" + b"9" * 500 + b"GB, MaxMemAllocated=1GB", "none of its 1 lines"),
        (b"SUMMARY: config=a params=1 peak_mem_bytes=1e9 alloc_mem_bytes=-1 avg_step_time=nan\n", "none of its 1 lines"),
        (b"SUMMARY: config=a params=" + b"9" * 5000 + b" peak_mem_bytes=1 alloc_mem_bytes=1 avg_step_time=1\n", "none of its 1 lines"),
        (b"MA " + b"9" * 5000 + b".1 GB Max_MA 1 GB CA 1 GB Max_CA 1 GB", "none of its 1 lines"),
        (b"time (ms) | fwd: inf | bwd: 1e9 | step: -1", "none of its 1 lines"),
        (b"step,loss\n" + b"1" * 50 + b",2\n-1,2\n1_0,2\n0x1,1\n", "none of its 4 rows"),
        (b"index, memory.used [MiB]\n0, 1e99 MiB\n0, -5 MiB\n", "none of its 2 rows"),
        (b"step,loss\n" + b'0,"' + b"x,\n" * 80_000, "field larger than field limit"),
        (b"PK\x03\x04" + b"a" * 100, "none of its 1 lines"),
        (b"=" * 60 + b"\n", "none of its 1 lines"),
        (b"[Rank 0] Creating model with hidden_dim=1\n", "nothing there is of memory"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_files(written(tmp_path, content))

    assert len(caught.value.message.splitlines()) == 1


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_BYTES", 2**20)
    endless = tmp_path / "log"
    with endless.open("wb") as stream:
        stream.truncate(2**40)

    with pytest.raises(InputError, match="larger than 1 MiB"):
        read_files([endless])
    with pytest.raises(InputError, match="a device, not a regular file"):
        read_files([Path("/dev/zero")])


@pytest.mark.parametrize(("path", "reason"), [(".", "Is a directory"), ("missing", "No such file"), ("x" * 300, "File name too long")])
def test_what_cannot_be_opened_is_named(path: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"cannot read .*{reason}"):
        read_files([Path(path)])


def test_a_line_without_end_is_read_once(tmp_path: Path) -> None:
    head = "SUMMARY: config=c params=1 peak_mem_bytes=3 alloc_mem_bytes=2 avg_step_time=1.0 "

    sources = read_files(written(tmp_path, head + "a=b" * 2_000_000 + "\r" + "time (ms)" + " | a: 1.0" * 500_000))

    assert sources.findings[0].readings["allocated_bytes"].bytes == 2


def test_escape_sequences_do_not_hide_what_a_log_says_and_do_not_get_out(tmp_path: Path) -> None:
    line = "\x1b[1;32mSUMMARY: config=\x1b]0;title\x07 params=1 peak_mem_bytes=3 alloc_mem_bytes=2 avg_step_time=1.0\x1b[0m\n"
    name = tmp_path / "a\x1b[31m\u202e.log"
    name.write_text(line)

    record = imported_record(CASE, read_files([name]).findings)

    assert record.allocated_bytes == 2
    assert not any("\x1b" in note for note in record.notes)


DAMAGE = st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=6), st.integers(0, 40)), max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(original=st.sampled_from(REAL), damage=DAMAGE)
def test_damaged_logs_give_a_record_that_can_be_stored_or_one_line(
    original: bytes, damage: list[tuple[int, bytes, int]], tmp_path: Path
) -> None:
    content = original
    for place, insert, cut in damage:
        content = content[:place] + insert + content[place + cut :]
    try:
        sources = read_files(written(tmp_path, content))
    except InputError as error:
        assert len(error.message.splitlines()) == 1
        return
    record = imported_record(CASE, sources.findings)

    write_json(tmp_path / "records.json", document([record]))

    assert load_records(tmp_path / "records.json") == (record,)


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16prof.files, "PATIENCE_S", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="nobody writes to this pipe"):
        read_files([pipe])


def test_a_named_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(LOSSES,))
    writer.start()

    assert len(read_files([pipe]).findings[0].steps) == 4
    writer.join()


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, LOSSES.encode())
    os.close(writing)

    sources = read_files([Path(f"/dev/fd/{reading}")])

    assert len(sources.findings[0].steps) == 4
