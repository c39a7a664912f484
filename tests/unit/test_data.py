"""Token streams: deterministic, disjoint between ranks, faithful to the text they read, and free of
torch."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bf16prof.errors import InputError
from bf16prof.measuring.data import TokenStream, make_stream, validate_spec

SPECS = ["synthetic", "pydoc", "pydoc-bpe"]


def stream(spec: str, *, vocab: int = 1024, length: int = 32, micro: int = 2, rank: int = 0, world: int = 1, seed: int = 0) -> TokenStream:
    """A stream with small defaults."""
    return make_stream(spec, vocab_size=vocab, sequence_length=length, micro_batch_size=micro, rank=rank, world_size=world, seed=seed)


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_has_its_shape_and_labels_are_the_inputs_shifted_by_one(spec: str) -> None:
    batches = stream(spec, micro=3, length=20)

    for _ in range(4):
        inputs, labels = batches.next_batch()

        assert [len(row) for row in inputs + labels] == [20] * 6
        assert [row[1:] for row in inputs] == [row[:-1] for row in labels]
        assert all(type(token) is int and 0 <= token < 1024 for row in inputs + labels for token in row)


@pytest.mark.parametrize("spec", SPECS)
def test_repeats_are_identical_and_another_seed_is_not(spec: str) -> None:
    assert stream(spec).next_batch() == stream(spec).next_batch()
    assert stream(spec, seed=1).next_batch() != stream(spec).next_batch()


@pytest.mark.parametrize("spec", SPECS)
def test_the_job_reads_the_same_rows_whatever_the_number_of_ranks(spec: str) -> None:
    whole = stream(spec, micro=4)
    ranks = [stream(spec, micro=2, rank=rank, world=2) for rank in (0, 1)]

    for _ in range(3):
        inputs, labels = whole.next_batch()
        parts = [rank.next_batch() for rank in ranks]

        assert parts[0] != parts[1]
        assert parts[0][0] + parts[1][0] == inputs
        assert parts[0][1] + parts[1][1] == labels


def test_ranks_read_disjoint_positions_and_one_epoch_is_the_whole_of_pydoc() -> None:
    length, world = 64, 2
    size = sum(len(text.encode()) for text in topics.values())
    windows = (size - 1) // length
    ranks = [stream("pydoc", vocab=256, length=length, micro=1, rank=rank, world=world) for rank in range(world)]

    starts = [rank.rows.row(number)[:length] for rank in ranks for number in range(rank.rank, windows, world)]

    read, written = Counter(token for row in starts for token in row), Counter(b"".join(text.encode() for text in topics.values()))
    assert sum(read.values()) == windows * length
    assert read <= written
    assert (written - read).total() < length + 1, "only the tail that fills no window is left out"


def test_pydoc_is_english_text_byte_for_byte() -> None:
    inputs, _ = stream("pydoc", vocab=256, length=200, micro=8).next_batch()
    everything = {text.encode() for text in topics.values()}

    found = [any(bytes(row) in text for text in everything) for row in inputs]

    assert sum(found) >= 7, "a window may straddle two documents, but hardly two of eight do"


def test_the_next_epoch_comes_in_another_order(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(1, 202)))
    rows = stream(f"text:{text}", length=10).rows

    first, second = [rows.row(number) for number in range(20)], [rows.row(number) for number in range(20, 40)]

    assert first != second
    assert sorted(first) == sorted(second) == [list(range(start, start + 11)) for start in range(1, 200, 10)]


@settings(max_examples=60, deadline=None)
@given(content=st.binary(min_size=2, max_size=300), length=st.integers(1, 12), seed=st.integers(0, 3), world=st.integers(1, 3))
def test_any_text_is_read_as_it_is(tmp_path_factory: pytest.TempPathFactory, content: bytes, length: int, seed: int, world: int) -> None:
    text = tmp_path_factory.mktemp("any") / "text"
    text.write_bytes(content)
    if len(content) <= length:
        with pytest.raises(InputError, match="fewer than"):
            stream(f"text:{text}", length=length)
        return

    windows = (len(content) - 1) // length
    expected = Counter(content[start : start + length + 1] for start in range(0, windows * length, length))
    ranks = [stream(f"text:{text}", vocab=256, length=length, micro=1, rank=rank, world=world, seed=seed) for rank in range(world)]
    batches = [ranks[number % world].next_batch() for number in range(windows)]

    assert Counter(bytes([*inputs[0], labels[0][-1]]) for inputs, labels in batches) == expected


def test_synthetic_data_can_be_learned_and_uses_any_vocabulary() -> None:
    rows = stream("synthetic", vocab=128_256, length=50_000).rows
    row = rows.row(0)
    pairs, tokens = Counter(pairwise(row)), Counter(row)

    entropy = -sum(count / len(row) * math.log(count / tokens[first]) for (first, _), count in pairs.items())

    assert max(row) > 100_000
    assert len(tokens) <= 256
    assert 1.0 < entropy < 1.3, "nats per token, given the token before; ln(256) would be 5.5"
    assert set(stream("synthetic", vocab=3).rows.row(1)) <= {0, 1, 2}
    assert stream("synthetic", vocab=1, length=4).rows.row(0) == [0] * 5


def test_bpe_is_shorter_than_bytes_stays_in_the_vocabulary_and_is_the_same_in_every_process(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    code = (
        "import hashlib, sys; from bf16prof.measuring.data import make_stream;"
        f"rows = [make_stream(s, vocab_size=600, sequence_length=64, micro_batch_size=8, rank=0, world_size=1, seed=0).next_batch()"
        f" for s in ('text-bpe:{text}', 'pydoc-bpe', 'synthetic', 'pydoc')];"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )

    def elsewhere(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
        ).stdout.strip()

    here = [stream(spec, vocab=600, length=64, micro=8).next_batch() for spec in (f"text-bpe:{text}", "pydoc-bpe", "synthetic", "pydoc")]
    assert elsewhere("1") == elsewhere("2") == hashlib.sha256(repr(here).encode()).hexdigest()
    assert max(token for row in here[1][0] for token in row) < 600

    tokens = stream(f"text-bpe:{text}", vocab=600).rows
    with pytest.raises(InputError, match="fewer than"):
        stream(f"text-bpe:{text}", vocab=600, length=5000)
    assert tokens.row(0) != list(text.read_bytes()[:33])


@pytest.mark.parametrize("spec", ["", "synthetic:", "wikitext", "pydoc:x", "text", "text:", "text-bpe:", "TEXT:a"])
def test_an_unknown_spec_is_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(InputError, match="unknown data") as caught:
        validate_spec(spec)

    assert "text:PATH" in caught.value.hint


@pytest.mark.parametrize("kind", ["text", "text-bpe"])
def test_a_file_that_cannot_be_read_is_one_line_with_its_path(tmp_path: Path, kind: str) -> None:
    empty, missing = tmp_path / "empty", tmp_path / "no such\nfile"
    empty.touch()

    for path, problem in (
        (empty, "the file is empty"),
        (missing, "No such file"),
        (tmp_path, "not a regular file"),
        (Path("a\0b"), "null"),
    ):
        spec = f"{kind}:{path}"
        validate_spec(spec)
        for use in (lambda spec=spec: validate_spec(spec, readable=True), lambda spec=spec: stream(spec)):
            with pytest.raises(InputError, match=problem) as caught:
                use()
            assert "\n" not in caught.value.message
            assert repr(str(path)) in caught.value.message


def test_text_needs_a_vocabulary_of_256() -> None:
    with pytest.raises(InputError, match="at least 256, not 255"):
        stream("pydoc", vocab=255)


def test_without_tokenizers_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    with pytest.raises(InputError, match="tokenizers") as caught:
        stream("pydoc-bpe")
    assert "pip install 'bf16prof[train]'" in caught.value.hint

    stream("pydoc")


def test_validating_reads_nothing_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from bf16prof.measuring.data import validate_spec; validate_spec('pydoc-bpe', readable=True);"
        "assert not {'torch', 'tokenizers', 'pydoc_data.topics'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
