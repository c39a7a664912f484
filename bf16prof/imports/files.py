"""From files to findings: the format of each is detected by its content, and what was not
understood is counted.

Files are what others wrote: they may be endless, binary, of another kind or made to harm. All of
one run are read together.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bf16prof.errors import InputError
from bf16prof.files import read_up_to
from bf16prof.imports import nvidia_smi
from bf16prof.imports.by_rank import ByRank, Shared
from bf16prof.imports.config_print import ConfigReader
from bf16prof.imports.example import ExampleReader
from bf16prof.imports.finding import Finding, MarkedReader, Reader
from bf16prof.imports.frames import SaidPhase
from bf16prof.imports.losses import COLUMNS, LossReader
from bf16prof.imports.megatron import MegatronReader
from bf16prof.imports.memory_status import MemoryStatusReader
from bf16prof.imports.memory_usage import MemoryUsageReader
from bf16prof.imports.nvidia_smi import NvidiaSmiReader
from bf16prof.imports.nvidia_smi_table import NvidiaSmiTableReader
from bf16prof.imports.out_of_memory import Message, OutOfMemoryReader
from bf16prof.imports.pipeline import PipelineReader
from bf16prof.imports.plain_pickle import load
from bf16prof.imports.sieve import Sieve, Skipped
from bf16prof.imports.snapshot import SnapshotReader
from bf16prof.imports.text import LARGEST_BYTES, LONGEST_LINE, LogLine, lines, raw_lines, unpacked
from bf16prof.imports.throughput import ThroughputReader
from bf16prof.imports.timers import TimersReader
from bf16prof.imports.trainer import TrainerReader
from bf16prof.imports.trainer_files import TrainerFilesReader, is_trainers

STDIN = Path("-")
"""What stands for standard input."""

KNOWN = (
    "the example's stdout, step,loss CSV, see_memory_usage, memory_status, the throughput timer, wall_clock_breakdown, "
    "an out-of-memory message, the Trainer's lines and JSON files, a memory snapshot, nvidia-smi"
)

_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_LARGEST_JSON = 64 * 2**20


@dataclass(frozen=True)
class Understood:
    """What was read in one file: lines, rows or events by format, and how many were not
    understood."""

    path: Path
    parts: dict[str, int] = field(default_factory=dict)
    rest: int = 0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} ({count:,})" for name, count in self.parts.items())
        name = self.path.name.encode(errors="backslashreplace").decode()
        return f"{name}: {parts}" + (f"; not understood: {self.rest:,}" if self.rest else "")


@dataclass(frozen=True)
class Sources:
    """What the files of one run say together. `failed`: the out-of-memory message of the rank that
    needed most."""

    findings: tuple[Finding, ...]
    files: tuple[Understood, ...]
    failed: Message | None = None

    def said(self, name: str) -> Any:
        """What the first format that says it says of the case (`finding.SAID`); `None` if none
        does."""
        return next((finding.said[name] for finding in self.findings if name in finding.said), None)

    @property
    def failure(self) -> str:
        """How the run died, in one line; empty if nothing says that it did."""
        return next((finding.failure for finding in self.findings if finding.failure), "")


class _TextReader(MarkedReader, Protocol):
    """One that knows who speaks."""

    @property
    def is_open(self) -> bool:
        """It waits for the next lines, which may hold none of its marks."""
        ...

    def line(self, line: LogLine) -> int:
        """Read one line; how many it explains."""
        ...


class _Readers:
    """One reader per format, for all files."""

    def __init__(self) -> None:
        self.failures = OutOfMemoryReader()
        self.texts: tuple[_TextReader, ...] = (
            Shared(ExampleReader()),
            ByRank(MemoryUsageReader),
            Shared(MemoryStatusReader()),
            ByRank(ThroughputReader),
            ByRank(TimersReader),
            ByRank(PipelineReader),
            ByRank(TrainerReader),
            Shared(MegatronReader()),
            ByRank(NvidiaSmiTableReader),
            ConfigReader(),
            self.failures,
        )
        self.losses = LossReader()
        self.trainer = TrainerFilesReader()
        self.samples = NvidiaSmiReader()
        self.snapshots = SnapshotReader()

    def findings(self) -> tuple[Finding, ...]:
        """What was said, the most direct first."""
        readers: tuple[Reader, ...] = (self.losses, self.trainer, *self.texts, self.snapshots, self.samples)
        found = {reader: finding for reader in readers if reader is not self.failures and (finding := reader.finding())}
        if (begun := next((finding.open_phase for finding in found.values() if finding.open_phase), None)) is not None:
            self.failures.assumed = SaidPhase(begun, f"the log: {begun} is the last that has begun")
        if died := self.failures.finding():
            found[self.failures] = died
        return tuple(found[reader] for reader in readers if reader in found)


def read_files(paths: Sequence[Path]) -> Sources:
    """Read the files of one run. Raises `InputError` naming the file that cannot be used, or saying
    that they are of several runs."""
    return _read_all([(path, None) for path in paths])


def read_message(text: str) -> Sources:
    """Read what somebody pasted. Raises `InputError` where nothing of it is understood."""
    return _read_all([(Path("the message"), text.encode(errors="replace"))])


def _read_all(contents: Sequence[tuple[Path, bytes | None]]) -> Sources:
    readers = _Readers()
    files: list[Understood] = []
    known: dict[bytes, Path] = {}
    paths = [path for path, _ in contents]
    for path, given in contents:
        try:
            content = _content(path) if given is None else given
            if (same := known.setdefault(hashlib.sha256(content).digest(), path)) is not path:
                raise ValueError(f"the same as {same}")
            files.append(_read(path, unpacked(content), readers))
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    try:
        findings = readers.findings()
    except ValueError as error:
        raise InputError(f"{', '.join(map(str, paths))}: {error}") from error
    if not findings:
        raise InputError(f"{', '.join(map(str, paths))}: nothing there is of memory, time or loss")
    return Sources(findings, tuple(files), readers.failures.worst)


def _content(path: Path) -> bytes:
    if path != STDIN:
        return read_up_to(LARGEST_BYTES, path, pipes=True)
    content = sys.stdin.buffer.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"larger than {LARGEST_BYTES >> 20} MiB")
    return content


def _read(path: Path, content: bytes, readers: _Readers) -> Understood:
    if _PICKLE.match(content):
        good, bad = readers.snapshots.read(load(content))
        return Understood(path, {SnapshotReader.format: good}, bad)
    if b"\0" in content:
        raise ValueError(f"binary, and no pickle; known: {KNOWN}")
    if (found := _json_object(content)) is not None:
        good, bad = readers.trainer.read(found)
        return Understood(path, {TrainerFilesReader.format: good}, bad)
    header = next((row for row in csv.reader([_first_line(content)])), [])
    if nvidia_smi.names(header):
        good, bad = readers.samples.rows(raw_lines(content), str(path))
        return _table(path, NvidiaSmiReader.format, good, bad)
    if set(COLUMNS) <= {cell.strip() for cell in header}:
        good, bad = readers.losses.rows(raw_lines(content), is_cut=not content.endswith((b"\n", b"\r")))
        return _table(path, LossReader.format, good, bad)
    if columns := nvidia_smi.guessed_columns(list(itertools.islice(_rows(content[: 2**16]), 200))):
        good, bad = readers.samples.headless(_rows(content), columns, str(path))
        return _table(path, NvidiaSmiReader.format, good, bad)
    return _text(path, content, readers)


def _rows(content: bytes) -> Iterator[list[str]]:
    """The rows of a CSV without header; a text that is no CSV has strange ones."""
    return (row for text in raw_lines(content) if text.strip() for row in [next(csv.reader([text]), [])])


def _json_object(content: bytes) -> dict[str, Any] | None:
    """A JSON file of the Trainer's; `None` for anything else."""
    if content.lstrip()[:1] != b"{" or len(content) > _LARGEST_JSON:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and is_trainers(found) else None


def _table(path: Path, name: str, good: int, bad: int) -> Understood:
    if not good:
        raise ValueError(f"{name}: none of its {bad:,} rows can be read")
    return Understood(path, {name: good}, bad)


def _text(path: Path, content: bytes, readers: _Readers) -> Understood:
    counts: Counter[str] = Counter()
    total, explained = 0, False
    sieve = Sieve(mark for reader in readers.texts for mark in reader.marks)
    sieve.is_open = any(reader.is_open for reader in readers.texts)
    for part in sieve.parts(content):
        if isinstance(part, Skipped):
            total += part.lines
            explained = explained and not part.lines
            continue
        for line in lines(part, path):
            if not line.text.strip():
                continue
            total += 1
            reader, count = _explaining(line, readers.texts)
            if reader is not None:
                counts[reader.format] += min(count, 1 if explained else 2)
            explained = reader is not None
        sieve.is_open = any(reader.is_open for reader in readers.texts)
    if not total:
        raise ValueError("empty")
    if not counts:
        raise ValueError(f"none of its {total:,} lines is understood; known: {KNOWN}")
    return Understood(path, dict(counts), total - sum(counts.values()))


def _explaining(line: LogLine, readers: Sequence[_TextReader]) -> tuple[_TextReader | None, int]:
    """The first reader that explains a line, and how many lines it does; only those are asked whom
    it may concern."""
    lowered = line.text.lower()
    for reader in readers:
        is_concerned = reader.is_open or any(mark in lowered for mark in reader.marks)
        if is_concerned and (count := reader.line(line)):
            return reader, count
    return None, 0


def _first_line(content: bytes) -> str:
    return next((text for text in raw_lines(content[: 4 * LONGEST_LINE]) if text.strip()), "")
