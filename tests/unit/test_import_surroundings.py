"""What lies around what a log says: tags of launchers, colours, time stamps, encodings,
compression; and who said it."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import pytest
from logs import only, read
from pasted import OUT_OF_MEMORY, THROUGHPUT

from bf16prof.errors import InputError
from bf16prof.imports import text as text_module
from bf16prof.imports.finding import GIB
from bf16prof.imports.text import lines, unpacked

USAGE = "after step\nMA {now} GB         Max_MA {peak} GB         CA 9.0 GB         Max_CA 9 GB \n"


@pytest.mark.parametrize(
    ("tag", "speaker"),
    [
        ("[rank3]: ", "rank 3"),
        ("[rank12]:", "rank 12"),
        ("[default3]:", "rank 3"),
        ("[1,3]<stdout>:", "rank 3"),
        ("3: ", "rank 3"),
        ("node-07: ", "host node-07"),
        ("10.0.0.5: ", "host 10.0.0.5"),
        ("(RayTrainWorker pid=1234, ip=10.0.0.1) ", "process pid=1234, ip=10.0.0.1"),
        ("(pid=77) ", "process pid=77"),
        ("worker-1  | ", "host worker-1"),
        ("2025-05-06T10:00:00.123456789Z stdout F ", ""),
        ("2025-05-06T10:00:00.123Z node-07: [rank3]: ", "rank 3"),
        ("stdout: ", ""),
        ("\x1b[36m[rank3]:\x1b[0m ", "rank 3"),
        ("", ""),
    ],
)
def test_tags_are_taken_off_and_say_who_speaks(tag: str, speaker: str) -> None:
    text = "    [INFO] [utils.py:1:x] Max_MA 1.0 GB"

    (line,) = lines(f"{tag}{text}\n".encode(), Path("log"))

    assert (line.text.lstrip(), line.speaker) == (text.lstrip(), speaker)


@pytest.mark.parametrize(
    "text",
    ["RuntimeError: CUDA out of memory", "step 3: x", "torch.OutOfMemoryError: CUDA", "| 3 | 4 |", "10:11:12 x", "time (ms) | fwd: 1"],
)
def test_what_only_looks_like_a_tag_stays(text: str) -> None:
    (line,) = lines(text.encode(), Path("log"))

    assert (line.text, line.speaker) == (text, "")


@pytest.mark.parametrize(
    ("path", "speaker"),
    [
        ("rank3.log", "rank 3"),
        ("log_rank_12.txt", "rank 12"),
        ("run/attempt_0/5/stderr.log", "rank 5"),
        ("train.log", ""),
        ("worker-2.out", "rank 2"),
    ],
)
def test_a_file_is_of_the_rank_that_its_name_says(path: str, speaker: str) -> None:
    assert next(lines(b"x", Path(path))).speaker == speaker


def test_what_overwrites_itself_has_the_speaker_of_its_line() -> None:
    found = [(line.text.strip(), line.speaker) for line in lines(b"node-1:   1%| 5/9\r  2%| 6/9\n  3%| 7/9\n", Path("log"))]

    assert found == [("1%| 5/9", "host node-1"), ("2%| 6/9", "host node-1"), ("3%| 7/9", "")]


@pytest.mark.parametrize("as_files", [True, False])
def test_of_several_ranks_the_worst_is_named(as_files: bool, tmp_path: Path) -> None:
    said = {rank: USAGE.format(now=float(rank), peak=rank + 2.5) for rank in (0, 4, 1)}
    if as_files:
        paths = [tmp_path / f"rank{rank}.log" for rank in said]
        for path, text in zip(paths, said.values(), strict=True):
            path.write_text(text)
        from bf16prof.imports.files import read_files

        (finding,) = read_files(paths).findings
    else:
        finding = only(tmp_path, "\n".join(f"[rank{rank}]: {line}" for rank, text in said.items() for line in text.splitlines()))

    assert round(finding.readings["run_peak_allocated_bytes"].bytes / GIB, 2) == 6.5
    assert "of rank 4, which holds most of 3" in finding.notes[0]
    assert finding.ranks == 5


@pytest.mark.parametrize(
    "encode",
    [lambda t: t.encode("utf-16"), lambda t: t.encode("utf-16-be"), lambda t: t.encode("utf-16-le"), lambda t: t.encode("utf-8-sig")],
)
def test_encodings_of_windows_are_read(encode: object, tmp_path: Path) -> None:
    content = encode(THROUGHPUT)  # type: ignore[operator]
    if content[:1] == b"\0":  # big-endian has no mark of its own here
        content = b"\xfe\xff" + content

    assert round(only(tmp_path, content).readings["run_peak_allocated_bytes"].bytes / GIB, 2) == 18.3


def test_gzip_is_read_also_of_several_members_and_cut_short(tmp_path: Path) -> None:
    whole = gzip.compress(THROUGHPUT.encode()) + gzip.compress(OUT_OF_MEMORY.encode())

    assert len(read(tmp_path, whole).findings) == 2
    assert len(read(tmp_path, gzip.compress(THROUGHPUT.encode())[:-6]).findings) == 1


def test_gzip_that_unpacks_to_more_than_a_file_may_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "LARGEST_BYTES", 2**16)
    packer = zlib.compressobj(wbits=31)
    bomb = packer.compress(b"\0" * 2**22) + packer.flush()

    with pytest.raises(InputError, match="larger than 0 MiB when unpacked"):
        read(tmp_path, bomb)
    assert unpacked(gzip.compress(b"x" * 2**16)) == b"x" * 2**16


def test_gzip_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be unpacked"):
        read(tmp_path, b"\x1f\x8b" + b"\xff" * 100)


def test_a_progress_bar_and_a_logging_prefix_in_front_change_nothing(tmp_path: Path) -> None:
    noisy = "\n".join(
        f"\x1b[32m  4%|#  | 20/500 [00:42<16:58,  2.12s/it]\x1b[0m\r2025-05-06 10:00:00 INFO {line}" for line in THROUGHPUT.splitlines()
    )

    found = {finding.format: finding for finding in read(tmp_path, noisy).findings}

    assert round(found["DeepSpeed's throughput timer"].readings["allocated_bytes"].bytes / GIB, 2) == 7.51
