"""Which lines of a text concern a reader at all: most lines of a long log are a job's own, and no
reader has to look at them.

Every reader names its `marks`: a line that holds none of them says nothing to it, unless it waits
for the lines after one that did. Whole blocks are searched for all marks, which takes far less time
than giving each line to every reader.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bf16prof.imports.text import LONGEST_LINE

BLOCK = 2**18
"""Bytes that are searched at once."""

_SPACES = bytes(ord(" ") if byte < 128 and chr(byte).isspace() and chr(byte) != "\n" else byte for byte in range(256))
_TOO_WIDE = b" " * (LONGEST_LINE // 2)
"""So many spaces may push what is behind them out of what is looked at of a line."""

_OTHER_SPACES = tuple(map(str.encode, "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200B)))))
_DRESSED = (b"\x1b", b"pid=", b"]:\n", b">:\n")
"""What is in lines that may hold nothing but what launchers and terminals lay around a line
(`text.py`), where spaces are taken out."""


@dataclass(frozen=True)
class Skipped:
    """So many lines with something in them, none of which concerns a reader."""

    lines: int


class Sieve:
    """Keeps lines that hold a mark, letters in any case, and lines that have to be read to know
    whether they hold one; counts the others.

    `is_open`: somebody waits for the next lines, whatever they hold. It may change after each of
    the parts.
    """

    def __init__(self, marks: Iterable[str]) -> None:
        distinct = {mark.encode() for mark in marks}
        self._marks = [mark for mark in distinct if not any(other in mark for other in distinct - {mark})]
        self.is_open = False

    def parts(self, content: bytes) -> Iterator[bytes | Skipped]:
        """The lines that are kept, each with its end, and what lies between them."""
        begin = 0
        while begin < len(content):
            end = _end_of_line(content, begin + BLOCK - 1)
            yield from self._block(content[begin:end])
            begin = end

    def _block(self, block: bytes) -> Iterator[bytes | Skipped]:
        at = 0
        for begin in [*self._marked(block), len(block)]:
            yield from self._between(block[at:begin])
            at = _end_of_line(block, begin)
            if begin < at:
                yield block[begin:at]

    def _between(self, lines: bytes) -> Iterator[bytes | Skipped]:
        """Lines without a mark: how many there are, or those themselves that have to be read to
        know. One of these may open a reader, which waits for the lines that follow it."""
        at = 0
        while self.is_open and at < len(lines):
            end = _end_of_line(lines, at)
            yield lines[at:end]
            at = end
        lines = lines[at:]
        middle = _end_of_line(lines, len(lines) // 2)
        if not lines:
            return
        if (count := _plain_lines(lines)) is not None:
            yield Skipped(count)
        elif middle < len(lines):
            yield from self._between(lines[:middle])
            yield from self._between(lines[middle:])
        else:
            yield from io.BytesIO(lines)

    def _marked(self, block: bytes) -> list[int]:
        """Where the lines begin that hold a mark."""
        lowered, found = block.lower(), set()
        for mark in self._marks:
            at = lowered.find(mark)
            while at >= 0:
                found.add(lowered.rfind(b"\n", 0, at) + 1)
                at = lowered.find(mark, _end_of_line(lowered, at))
        return sorted(found)


def _end_of_line(content: bytes, at: int) -> int:
    """The end of the line that a position lies in."""
    return content.find(b"\n", at) + 1 or len(content)


def _plain_lines(block: bytes) -> int | None:
    """How many lines with something in them there are; `None` where they would have to be undressed
    first to know."""
    if block.count(b"\r") != block.count(b"\r\n") or (not block.isascii() and any(space in block for space in _OTHER_SPACES)):
        return None
    spaced = block.translate(_SPACES)
    left = b"\n" + spaced.replace(b" ", b"") + b"\n"
    if _TOO_WIDE in spaced or any(part in left for part in _DRESSED):
        return None
    while b"\n\n" in left:
        left = left.replace(b"\n\n", b"\n")
    return left.count(b"\n") - 1
