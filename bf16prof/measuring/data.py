"""What a measured job reads: deterministic token streams, in plain Python.

No torch here on purpose: the CPU allocator is measured to the byte while these streams run, so a
batch is lists of integers and the worker makes tensors of it. Rows are numbered over the whole job
and a row depends on nothing but its number, the seed and the spec: runs repeat, ranks read
different rows, and one rank with micro-batch 4 sees the same rows as two ranks with micro-batch 2.

    synthetic        a seeded Markov chain over a part of the vocabulary, which is learned quickly
    pydoc            the language reference in every Python (`pydoc_data.topics`), byte by byte
    text:PATH        any file, byte by byte
    hf:NAME:CONFIG   the train split of a dataset in the local cache (`hub_data.py`), byte by byte
    pydoc-bpe, text-bpe:PATH, hf-bpe:NAME:CONFIG    the same, in tokens of a BPE trained on it
"""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from bf16prof.errors import InputError, install_hint
from bf16prof.files import read_up_to
from bf16prof.measuring.hub_data import Dataset
from bf16prof.profiles.names import unknown

BYTES = 256
"""Token ids of byte-level text, and the alphabet that a byte-level BPE starts from."""

LARGEST_TEXT = 4 * 2**30
"""Bytes of a text, which every rank holds whole."""

KNOWN = ("synthetic", "pydoc", "pydoc-bpe", "text:PATH", "text-bpe:PATH", "hf:NAME:CONFIG", "hf-bpe:NAME:CONFIG")


@dataclass(frozen=True)
class _Spec:
    """A parsed data spec: the text (a file, a dataset, pydoc when both are None) and how it becomes
    tokens; `text=False` is synthetic."""

    text: bool
    bpe: bool = False
    path: Path | None = None
    dataset: Dataset | None = None

    @property
    def name(self) -> str:
        if self.dataset is not None:
            return f"data {self.dataset}"
        return "pydoc" if self.path is None else f"data file {str(self.path)!r}"


class _Rows(Protocol):
    """Where rows come from."""

    def row(self, number: int) -> list[int]:
        """Row `number` (0, 1, ...) of the job: `sequence_length + 1` token ids."""
        ...


@dataclass
class TokenStream:
    """The batches of one rank, without end."""

    rows: _Rows
    micro_batch_size: int
    rank: int
    world_size: int
    batches_read: int = 0

    def next_batch(self) -> tuple[list[list[int]], list[list[int]]]:
        """Inputs and labels, each [micro_batch_size][sequence_length]; a label is the token that
        follows its input."""
        first = (self.batches_read * self.world_size + self.rank) * self.micro_batch_size
        self.batches_read += 1
        rows = [self.rows.row(number) for number in range(first, first + self.micro_batch_size)]
        return [row[:-1] for row in rows], [row[1:] for row in rows]


def make_stream(
    spec: str, *, vocab_size: int, sequence_length: int, micro_batch_size: int, rank: int, world_size: int, seed: int
) -> TokenStream:
    """The stream of one rank. Raises `InputError` for a spec or text that cannot be used with that
    vocabulary or sequence length."""
    assert 0 <= rank < world_size
    assert min(vocab_size, sequence_length, micro_batch_size) > 0
    parsed = _parse(spec)
    rows: _Rows
    if parsed.text:
        rows = _TextRows(_tokens(parsed, spec, vocab_size, seed), sequence_length, seed, parsed.name)
    else:
        rows = _MarkovRows(vocab_size, sequence_length, seed)
    return TokenStream(rows, micro_batch_size, rank, world_size)


def validate_spec(spec: str, *, readable: bool = False, download: bool = False) -> None:
    """Raise `InputError` unless `spec` is well formed and, with `readable`, its file, dataset and
    tokenizer are at hand.

    Imports nothing heavy but for a dataset, which `download` may fetch.
    """
    parsed = _parse(spec)
    if readable and parsed.path is not None:
        _check_file(parsed.path, parsed.name)
    if readable and parsed.dataset is not None:
        parsed.dataset.require(download=download)
    if readable and parsed.bpe and find_spec("tokenizers") is None:
        raise _no_tokenizers()


def _parse(spec: str) -> _Spec:
    kind, colon, path = spec.partition(":")
    if kind in ("text", "text-bpe") and path:
        return _Spec(text=True, bpe=kind == "text-bpe", path=Path(path).expanduser())
    if kind in ("hf", "hf-bpe") and path:
        return _Spec(text=True, bpe=kind == "hf-bpe", dataset=Dataset.named(path))
    if not colon and kind in ("synthetic", "pydoc", "pydoc-bpe"):
        return _Spec(text=kind != "synthetic", bpe=kind == "pydoc-bpe")
    raise unknown("data", spec, KNOWN, where="workload.data: ")


class _MarkovRows:
    """A walk over 256 states (fewer in a smaller vocabulary) scattered over the token ids.

    From each state four others follow, with probabilities 0.50, 0.21, 0.16 and 0.13. So the loss
    falls first from ln(vocabulary) to ln(256) = 5.5, when a model knows which tokens occur, and
    then towards the chain's entropy of 1.23 nats per token.
    """

    STATES = 256
    SUCCESSORS = 4

    def __init__(self, vocab_size: int, sequence_length: int, seed: int) -> None:
        chain = random.Random(f"{seed}:chain")
        states = min(vocab_size, self.STATES)
        self._token = chain.sample(range(vocab_size), states)
        self._next = [[chain.randrange(states) for _ in range(self.SUCCESSORS)] for _ in range(states)]
        self._length = sequence_length + 1
        self._seed = seed

    def row(self, number: int) -> list[int]:
        draw = random.Random(f"{self._seed}:row:{number}").random
        state = int(draw() * len(self._token))
        row = []
        for _ in range(self._length):
            row.append(self._token[state])
            state = self._next[state][int(self.SUCCESSORS * draw() ** 2)]
        return row


@dataclass
class _TextRows:
    """Consecutive windows of a text, in another order in every epoch; neighbours share one token,
    the label of one and input of the next.

    Rows of different numbers are different windows until the text is used up, whatever the number
    of ranks.
    """

    tokens: Sequence[int]
    sequence_length: int
    seed: int
    name: str
    _epoch: int = -1
    _order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.tokens) < self.sequence_length + 1:
            problem = f"{len(self.tokens)} tokens, fewer than the {self.sequence_length + 1} of one sequence and its last label"
            raise InputError(f"{self.name}: {problem}", hint="use a longer text or a shorter --sequence-length")

    def row(self, number: int) -> list[int]:
        epoch, position = divmod(number, (len(self.tokens) - 1) // self.sequence_length)
        start = self._window(epoch, position) * self.sequence_length
        return list(self.tokens[start : start + self.sequence_length + 1])

    def _window(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range((len(self.tokens) - 1) // self.sequence_length))
            random.Random(f"{self.seed}:epoch:{epoch}").shuffle(self._order)
        return self._order[position]


def _tokens(parsed: _Spec, spec: str, vocab_size: int, seed: int) -> Sequence[int]:
    """The whole text as token ids, its documents in an order that the seed decides."""
    if vocab_size < BYTES:
        raise InputError(
            f"data {spec!r} needs a vocabulary of at least {BYTES}, not {vocab_size}", hint="raise vocab_size or use synthetic"
        )
    documents = _documents(parsed)
    order = random.Random(f"{seed}:documents").sample(range(len(documents)), len(documents))
    if not parsed.bpe:
        return b"".join(documents[index] for index in order)
    encoded = _encode_bpe(documents, vocab_size)
    return array("I", (token for index in order for token in encoded[index]))


def _documents(parsed: _Spec) -> list[bytes]:
    if parsed.dataset is not None:
        return parsed.dataset.documents()
    return _pydoc() if parsed.path is None else [_read(parsed.path, parsed.name)]


def _pydoc() -> list[bytes]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError("this Python has no pydoc_data.topics", hint="use data synthetic or text:PATH") from None
    return [topics[name].encode() for name in sorted(topics)]


def _check_file(path: Path, name: str) -> None:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not path.is_file():
        raise InputError(f"{name}: not a regular file")
    if not size:
        raise InputError(f"{name}: the file is empty")
    if not os.access(path, os.R_OK):
        raise InputError(f"{name}: Permission denied")


def _read(path: Path, name: str) -> bytes:
    _check_file(path, name)
    return read_up_to(LARGEST_TEXT, path)


def _no_tokenizers() -> InputError:
    return InputError("BPE data needs the tokenizers library", hint=f"{install_hint('train')}, or use the byte-level data")


def _encode_bpe(documents: list[bytes], vocab_size: int) -> list[list[int]]:
    """Each document in the tokens of a byte-level BPE trained on all of them, of `vocab_size`
    tokens at most."""
    # One thread per rank: ranks train at the same time, and a process whose tokenizers used threads
    # warns at every later fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise _no_tokenizers() from None
    texts = [document.decode(errors="replace") for document in documents]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainer)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
