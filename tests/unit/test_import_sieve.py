"""What no reader has to look at is skipped, and nothing that a reader would have understood."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pasted
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from logs import BREAKDOWN, EXAMPLE, written

from bf16prof.imports import files, sieve
from bf16prof.imports.files import read_files
from bf16prof.imports.text import LogLine, lines

SAMPLES = [text for name, text in vars(pasted).items() if name.isupper() and isinstance(text, str)]
PIECES = [text.rstrip("\n") for text in (*SAMPLES, EXAMPLE.read_text(), BREAKDOWN.read_text()[:2000])]
LINES = sorted({line for piece in PIECES for line in piece.splitlines()})
COLOURED = ["\x1b[0;32m/home/u/train.py\x1b[0m in \x1b[0;36mmain\x1b[0;34m(\x1b[0m\x1b[0;34m)\x1b[0m", "    loss.backward()"]
"""A frame as IPython paints it: its mark is in several pieces, and its code is in the next line."""
BARE = [
    "", " ", "\t\x1f", "word", "two words", "[rank0]:", "[rank1]: ", " [rank1]:  ", "(pid=7)", "web | [1,0]<stdout>:", "node-1: ", "2: x",
    "\x1b[0m", "\x1b[1mMax\x1b[0m_MA", "\u3000", "\u00a0x", "\ufeff", "a\rb", "\r", "x\r", " " * 4100 + "x", "[rank0]: " + " " * 4000 + "x",
    "CUDA error: out of memory", "HIP OUT OF MEMORY", "After the Optimizer STEP", "  json = {", '"a": {', "}", "[config.py:1:print] a .. {",
    *COLOURED, "CUDA out \x1b[0mof memory. Tried \x1b[0mto allocate 2.00 GiB (GPU 0; 79.35 GiB total capacity;",
    "70.00 GiB already allocated;", "1.00 GiB free; 75.00 GiB reserved in total by PyTorch)", "  js\x1b[0mon = {",
    'File "a.py", line 1 in f', "Kelvin \u212a", "日本語", "\u2003\x85", "[rank3]: CUDA error: out of memory", "[rank3]: more of it",
]  # fmt: skip
"""Lines that hold nothing when they are undressed, or that open what the next ones go on with."""


class Everything(sieve.Sieve):
    """Skips nothing."""

    def parts(self, content: bytes) -> Iterator[bytes]:
        """All lines."""
        return iter(content.splitlines(keepends=True) if b"\r" not in content else [line + b"\n" for line in content.split(b"\n")])


def said(text: str) -> tuple[object, ...]:
    """What a text says and how many of its lines are understood, or why it says nothing."""
    readers = files._Readers()
    try:
        return files._text(Path("log"), text.encode(), readers), readers.findings()
    except ValueError as error:
        return (str(error),)


def said_by_all(text: str) -> tuple[object, ...]:
    """The same where every reader sees every line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "Sieve", Everything)
        patch.setattr(files, "_explaining", lambda line, readers: next(((r, n) for r in readers if (n := r.line(line))), (None, 0)))
        return said(text)


@given(st.lists(st.sampled_from(PIECES) | st.sampled_from(LINES) | st.sampled_from(BARE), max_size=40), st.sampled_from(["\n", "\r\n"]))
@example(PIECES, "\n")
@example(BARE, "\r\n")
@example(
    ["\x1b[0;32m/home/u/train.py\x1b[0m in \x1b[0;36mmain\x1b[0;34m(\x1b[0m\x1b[0;34m)\x1b[0m", "    loss.backward()", *BARE[-3:]], "\n"
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_log_says_the_same_as_if_all_readers_saw_every_line(monkeypatch: pytest.MonkeyPatch, parts: list[str], end: str) -> None:
    monkeypatch.setattr(sieve, "BLOCK", 300)
    text = end.join(line for part in parts for line in part.split("\n"))

    assert said(text) == said_by_all(text)


@pytest.mark.parametrize("sample", range(len(PIECES)))
def test_a_few_lines_of_use_are_found_among_many(sample: int) -> None:
    words = "words that say nothing\n" * 3000

    found = said(f"{words}{PIECES[sample]}\n{words}")

    assert len(found) == 2
    assert found == said_by_all(f"{words}{PIECES[sample]}\n{words}")


def test_every_kind_of_space_is_one() -> None:
    spaces = {chr(code).encode() for code in range(128, 0xD800) if chr(code).isspace()}

    assert set(sieve._OTHER_SPACES) == spaces | {"\ufeff".encode()}


def test_a_rank_that_never_ends_its_message_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bf16prof.imports.out_of_memory.PATIENCE", 50)
    begun = "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    everybody = files._Readers()
    looked = 0

    def counted(line: LogLine, readers: object) -> tuple[object, int]:
        nonlocal looked
        looked += 1
        return everybody.failures, everybody.failures.line(line)

    monkeypatch.setattr(files, "_explaining", counted)
    files._text(Path("log"), (begun + "[rank0]: word\n" * 3000).encode(), everybody)

    assert looked < 100
    assert [message.rank for message in everybody.failures.messages] == [1]


def test_marks_are_written_small() -> None:
    for reader in files._Readers().texts:
        assert reader.marks
        assert all(mark == mark.lower() for mark in reader.marks)


def test_no_line_of_a_block_without_a_mark_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bytes] = []

    def looking(part: bytes, path: Path) -> Iterator[LogLine]:
        looked.append(part)
        return lines(part, path)

    monkeypatch.setattr(files, "lines", looking)
    useful = "[Rank 0] time (ms) | fwd: 181.20 | bwd: 353.61 | step: 65.90\n"
    (path,) = written(tmp_path, "[rank3]: word\n" * 100_000 + useful)

    (file,) = read_files([path]).files

    assert looked == [useful.encode()]
    assert file.rest == 100_000
