"""From files to findings: the format of each is detected by its content, and what was not understood is counted.

Files are what others wrote: they may be endless, binary, of another kind or made to harm. All of one run are read together.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.files import read_up_to
from bf16prof.imports import nvidia_smi
from bf16prof.imports.example import ExampleReader
from bf16prof.imports.finding import Finding, LineReader
from bf16prof.imports.losses import COLUMNS, LossReader
from bf16prof.imports.memory_usage import MemoryUsageReader
from bf16prof.imports.nvidia_smi import NvidiaSmiReader
from bf16prof.imports.plain_pickle import load
from bf16prof.imports.snapshot import SnapshotReader
from bf16prof.imports.timers import TimersReader

LARGEST_BYTES = 256 * 2**20
LONGEST_LINE = 4000
"""Characters of a line that are looked at; what is longer is not what any of the formats writes."""

KNOWN = "the example's stdout, step,loss CSV, see_memory_usage, wall_clock_breakdown, a memory snapshot, nvidia-smi --query-gpu CSV"

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PICKLE = re.compile(rb"\x80[\x02-\x05]")


@dataclass(frozen=True)
class Understood:
    """What was read in one file: lines, rows or events by format, and how many were not understood."""

    path: Path
    parts: dict[str, int] = field(default_factory=dict)
    rest: int = 0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} ({count:,})" for name, count in self.parts.items())
        name = self.path.name.encode(errors="backslashreplace").decode()
        return f"{name}: {parts}" + (f"; not understood: {self.rest:,}" if self.rest else "")


@dataclass(frozen=True)
class Sources:
    """What the files of one run say together."""

    findings: tuple[Finding, ...]
    files: tuple[Understood, ...]


class _Readers:
    """One reader per format, for all files."""

    def __init__(self) -> None:
        self.lines: tuple[LineReader, ...] = (ExampleReader(), MemoryUsageReader(), TimersReader())
        self.losses = LossReader()
        self.samples = NvidiaSmiReader()
        self.snapshots = SnapshotReader()

    def findings(self) -> tuple[Finding, ...]:
        """What was said, the most direct first."""
        readers = (self.losses, *self.lines, self.snapshots, self.samples)
        return tuple(found for reader in readers if (found := reader.finding()))


def read_files(paths: Sequence[Path]) -> Sources:
    """Read the files of one run. Raises `InputError` naming the file that cannot be used, or saying that they are of several runs."""
    readers = _Readers()
    files: list[Understood] = []
    known: dict[bytes, Path] = {}
    for path in paths:
        try:
            content = read_up_to(LARGEST_BYTES, path, pipes=True)
            if (same := known.setdefault(hashlib.sha256(content).digest(), path)) is not path:
                raise ValueError(f"the same as {same}")
            files.append(_read(path, content, readers))
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    try:
        findings = readers.findings()
    except ValueError as error:
        raise InputError(f"{', '.join(map(str, paths))}: {error}") from error
    if not findings:
        raise InputError(f"{', '.join(map(str, paths))}: nothing there is of memory, time or loss")
    return Sources(findings, tuple(files))


def _read(path: Path, content: bytes, readers: _Readers) -> Understood:
    if _PICKLE.match(content):
        good, bad = readers.snapshots.read(load(content))
        return Understood(path, {SnapshotReader.format: good}, bad)
    if b"\0" in content:
        raise ValueError(f"binary, and no pickle; known: {KNOWN}")
    header = next((row for row in csv.reader([_first_line(content)])), [])
    if nvidia_smi.names(header):
        good, bad = readers.samples.rows(_lines(content), str(path))
        return _table(path, NvidiaSmiReader.format, good, bad)
    if set(COLUMNS) <= {cell.strip() for cell in header}:
        good, bad = readers.losses.rows(_lines(content), is_cut=not content.endswith((b"\n", b"\r")))
        return _table(path, LossReader.format, good, bad)
    return _text(path, content, readers)


def _table(path: Path, name: str, good: int, bad: int) -> Understood:
    if not good:
        raise ValueError(f"{name}: none of its {bad:,} rows can be read")
    return Understood(path, {name: good}, bad)


def _text(path: Path, content: bytes, readers: _Readers) -> Understood:
    counts: Counter[str] = Counter()
    total, explained = 0, False
    for text in _lines(content):
        if not text.strip():
            continue
        total += 1
        reader, lines = next(((r, n) for r in readers.lines if (n := r.line(text))), (None, 0))
        if reader is not None:
            counts[reader.format] += min(lines, 1 if explained else 2)
        explained = reader is not None
    if not total:
        raise ValueError("empty")
    if not counts:
        raise ValueError(f"none of its {total:,} lines is understood; known: {KNOWN}")
    return Understood(path, dict(counts), total - sum(counts.values()))


def _lines(content: bytes) -> Iterator[str]:
    """The lines as text, without the escape sequences of terminals; what overwrites itself on a terminal is several lines."""
    for raw in io.BytesIO(content):
        for part in raw.decode("utf-8", errors="replace").rstrip("\r\n").split("\r"):
            text = part.removeprefix("\ufeff")[: 2 * LONGEST_LINE]
            yield (_ESCAPES.sub("", text) if "\x1b" in text else text)[:LONGEST_LINE].rstrip()


def _first_line(content: bytes) -> str:
    return next((text for text in _lines(content[: 4 * LONGEST_LINE]) if text.strip()), "")
