"""From the bytes of a file to lines of text, each with whoever printed it.

What launchers, schedulers and terminals lay around a line is taken off: escape sequences, tags of
ranks and hosts, time stamps of containers. What overwrites itself on a terminal (progress bars) is
several lines.
"""

from __future__ import annotations

import codecs
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LARGEST_BYTES = 256 * 2**20
"""Of a file, and of what a compressed one unpacks to."""

LONGEST_LINE = 4000
"""Characters of a line that are looked at; what is longer is not what any of the formats writes."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\))")
_GZIP = b"\x1f\x8b"
_BOMS = ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

_TAG = re.compile(
    r"""
    \s{0,8}(?:
      \[(?:rank|default|worker|trainer|local_rank)[ _-]?(?P<rank>\d{1,7})\]:[ ]?  # torch and torchrun
    | \[\d{1,7},(?P<mpi>\d{1,7})\]<std(?:out|err|diag)>:[ ]?                      # mpirun --tag-output
    | (?P<srun>\d{1,7}):[ ]                                                      # srun --label
    | \((?:\w{1,40}[ ])?(?P<pid>pid=\d{1,10}(?:,[ ]ip=[\w.:-]{1,60})?)\)[ ]?     # Ray
    | (?P<compose>[a-zA-Z][\w.-]{0,60}?)[ ]+\|[ ]                                 # docker compose
    | (?P<host>(?=[\w.-]{0,60}\d)(?![\w.-]{0,60}(?:Error|Exception|Warning):)[a-zA-Z\d][\w.-]{0,60}):[ ]  # DeepSpeed's launcher, pdsh
    | std(?:out|err):[ ]
    | \d{4}-\d\d-\d\dT[\d:.]{8,24}(?:Z|[+-]\d\d:?\d\d)[ ](?:std(?:out|err)[ ][FP][ ])?  # Kubernetes, Docker
    )
    """,
    re.VERBOSE,
)
_MOST_TAGS = 4
_FILE_RANK = re.compile(r"(?:rank|worker|proc|process|trainer)[-_.]?(\d{1,7})(?!\d)", re.IGNORECASE)
_TORCHRUN = re.compile(r"/attempt_\d+/(\d{1,7})/std(?:out|err)\.log$")


@dataclass(frozen=True)
class LogLine:
    """A line without what others laid around it. `speaker` is who printed it ("rank 3", "host
    node-07"), empty if nothing says."""

    text: str
    speaker: str = ""

    @property
    def rank(self) -> int | None:
        """The rank that printed it."""
        kind, _, number = self.speaker.partition(" ")
        return int(number) if kind == "rank" else None


def unpacked(content: bytes) -> bytes:
    """The content of a file as UTF-8, whatever it was packed in. Raises `ValueError` for what is
    cut, or has no end."""
    if content.startswith(_GZIP):
        content = _gunzipped(content)
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, errors="replace").encode()
    if content[1:2] == b"\0" and b"\0" not in content[0:200:2]:
        return content.decode("utf-16-le", errors="replace").encode()  # Windows without its mark
    return content.removeprefix(codecs.BOM_UTF8)


def _gunzipped(content: bytes) -> bytes:
    """All members of a gzip file. What is missing at the end of a log that is still written is no
    fault."""
    found, rest = b"", content
    while rest.startswith(_GZIP):
        unpacker = zlib.decompressobj(wbits=31)
        try:
            found += unpacker.decompress(rest, LARGEST_BYTES - len(found) + 1)
        except zlib.error as error:
            raise ValueError(f"gzip that cannot be unpacked ({error})") from error
        if len(found) > LARGEST_BYTES or unpacker.unconsumed_tail:
            raise ValueError(f"larger than {LARGEST_BYTES >> 20} MiB when unpacked")
        rest = unpacker.unused_data
    return found


def raw_lines(content: bytes) -> Iterator[str]:
    """The lines as text, without the escape sequences of terminals."""
    return (text for raw in io.BytesIO(content) for text in _parts(raw))


def _parts(raw: bytes) -> Iterator[str]:
    """What one line of a file shows one after the other where a terminal would have overwritten
    it."""
    for part in raw.decode("utf-8", errors="replace").rstrip("\r\n").split("\r"):
        text = part.removeprefix("\ufeff")[: 2 * LONGEST_LINE]
        yield (_ESCAPES.sub("", text) if "\x1b" in text else text)[:LONGEST_LINE].rstrip()


def lines(content: bytes, path: Path) -> Iterator[LogLine]:
    """The lines with their speakers: the tag of a line says it, else the name of the file. What
    overwrites itself has one speaker."""
    default = _of_file(path)
    for raw in io.BytesIO(content):
        speaker = default
        for text in _parts(raw):
            line = _untagged(text, speaker)
            speaker = line.speaker
            yield line


def _untagged(text: str, default: str) -> LogLine:
    speaker, start = "", 0
    for _ in range(_MOST_TAGS):
        found = _TAG.match(text, start)
        if found is None:
            break
        start = found.end()
        rank = next((found[name] for name in ("rank", "mpi", "srun") if found[name]), None)
        if rank is not None:
            speaker = f"rank {int(rank)}"
        elif not speaker and (other := found["pid"] or found["compose"] or found["host"]):
            speaker = f"process {other}" if found["pid"] else f"host {other}"
    return LogLine(text[start:], speaker or default)


def _of_file(path: Path) -> str:
    """The rank that a file is of by its name: `rank3.log`, or torchrun's
    `attempt_0/3/stdout.log`."""
    found = _TORCHRUN.search(str(path.absolute())) or _FILE_RANK.search(path.name)
    return f"rank {int(found[1])}" if found else ""
