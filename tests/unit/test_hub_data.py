"""Text of the Hugging Face Hub as data of a job: from a folder, which `datasets` reads like a
cached dataset, never from the network."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from bf16prof.errors import InputError
from bf16prof.measuring import hub_data
from bf16prof.measuring.data import make_stream, validate_spec
from bf16prof.measuring.hub_data import Dataset

ROWS = ("The quick brown fox", "", "jumps over", "the lazy dog.")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of four rows; its cache lies beside it, and the network is out of reach."""
    made = tmp_path / "fox"
    made.mkdir()
    (made / "train.jsonl").write_text("".join(json.dumps({"title": "fox", "text": row}) + "\n" for row in ROWS))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return made


def test_its_column_of_text_is_read_byte_by_byte(folder: Path) -> None:
    assert Dataset(str(folder)).documents() == [row.encode() for row in ROWS if row]
    text = b"".join(row.encode() for row in ROWS)
    stream = make_stream(f"hf:{folder}", vocab_size=256, sequence_length=8, micro_batch_size=2, rank=0, world_size=1, seed=1)
    words = {bytes(row) for row in stream.next_batch()[0]}
    assert all(len(row) == 8 for row in words)
    assert {byte for row in words for byte in row} <= set(text)


def test_of_a_large_one_the_beginning_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_data, "LARGEST_BYTES", 24)
    assert b"".join(Dataset(str(folder)).documents()) == b"The quick brown foxjumps"


def test_what_is_not_in_the_cache_says_how_to_get_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data hf:wikitext:wikitext-103-raw-v1: no such dataset in the local cache") as caught:
        validate_spec("hf:wikitext:wikitext-103-raw-v1", readable=True)
    assert caught.value.hint == "bf16prof measure --download fetches it"
    validate_spec("hf:wikitext:wikitext-103-raw-v1")


def test_a_dataset_without_text_is_refused(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(InputError, match="no column of text; it has number"):
        validate_spec(f"hf:{folder}", readable=True)


def test_without_the_library_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_data, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="needs the datasets library") as caught:
        validate_spec("hf:wikitext", readable=True)
    assert "bf16prof[data]" in caught.value.hint


def test_a_spec_is_checked_without_the_library() -> None:
    before = "datasets" in sys.modules
    validate_spec("hf-bpe:wikitext:wikitext-2-raw-v1")
    assert ("datasets" in sys.modules) is before
    with pytest.raises(InputError, match="unknown data 'hf:'"):
        validate_spec("hf:")
