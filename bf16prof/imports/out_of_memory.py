"""torch's message when the caching allocator finds no memory (c10/cuda/CUDACachingAllocator.cpp,
`malloc`), in all of its forms:

* before 1.4: `... Tried to allocate 12.50 MiB (GPU 0; 10.92 GiB total capacity; 8.57 MiB already
  allocated; 9.28 GiB free; 4.68 MiB cached)`, where cached is what is reserved and not allocated;
* until 2.0: `... 1.02 GiB free; 37.61 GiB reserved in total by PyTorch)`;
* since 2.1: `Tried to allocate 1.16 GiB. GPU 6 has a total capacity of 79.11 GiB of which 843.88
  MiB is free. [Process 41721 has 78.27 GiB memory in use.] [Including non-PyTorch memory, this
  process has ... memory in use.] [... allowed;] Of the allocated memory 71.93 GiB is allocated by
  PyTorch, [with ... allocated in private pools,] and 4.81 GiB is reserved by PyTorch but
  unallocated.`

CUDA stands for HIP or XPU as well. Sizes have two decimals, or are whole bytes. The rank is that of
the line's tag; without one, only the GPU's number is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bf16prof.imports.finding import Finding, Reading, rounded, total
from bf16prof.imports.frames import FRAME_MARKS, Frames, SaidPhase
from bf16prof.imports.text import LogLine
from bf16prof.records import OutOfMemory
from bf16prof.vocabulary import TRAINING

_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = r"(?P<{name}>\d{{1,6}}(?:\.\d{{1,6}})?) ?(?P<{name}_unit>bytes|B|KiB|MiB|GiB|TiB)"


def _size(name: str) -> str:
    return _SIZE.format(name=name)


_BEGINS = re.compile(r"\b(?:CUDA|HIP|XPU|NPU|MPS backend) (?:error: )?out of memory\b", re.IGNORECASE)
_TRIED = re.compile(rf"[Tt]ried to allocate {_size('tried')}")
_GPU = re.compile(r"\bGPU (\d{1,4})\b")
_PARTS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"total capaci?ty of {_size('total')}",
        rf"{_size('total')} total capacity",
        rf"of which {_size('free')} is free",
        rf"{_size('free')} free\b",
        rf"[Oo]f the allocated memory {_size('allocated')} is allocated",
        rf"{_size('allocated')} already allocated",
        rf"{_size('reserved')} reserved in total",
        rf"{_size('unallocated')} is reserved by \w+ but unallocated",
        rf"{_size('unallocated')} cached",
        rf"{_size('allowed')} allowed",
        rf"this process has {_size('process')} memory in use",
    )
)
_PROCESS = re.compile(rf"Process (\d{{1,10}}) has {_size('other')} memory in use")
_LAST = ("unallocated", "reserved")
"""The numbers that end a message."""

_WRAPPED_LINES = 12
"""So many lines a message may have been broken into where it was pasted."""

MOST = 65_536
"""So many messages are kept."""
PATIENCE = 10_000
"""After so many lines of others, a message that a rank has begun is over."""


@dataclass(frozen=True)
class Message:
    """An out-of-memory message: the sizes that it gives by name, each with its rounding, and who
    said it where.

    Names: `tried`, `total`, `free`, `allocated`, `reserved`, `unallocated` (reserved and not
    allocated), `allowed` (of the allocator), `process` (used by this process), `beside` (used by
    whatever is not this allocator). `processes`: bytes by process id.
    """

    sizes: Mapping[str, Reading]
    gpu: int | None = None
    rank: int | None = None
    place: SaidPhase = field(default_factory=SaidPhase)
    processes: Mapping[int, Reading] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """ "rank 3 (GPU 3)", or as much of it as is known."""
        gpu = "" if self.gpu is None else f"GPU {self.gpu}"
        rank = "" if self.rank is None else f"rank {self.rank}"
        return f"{rank} ({gpu})" if rank and gpu else rank or gpu

    @property
    def needed(self) -> Reading | None:
        """What would have been allocated had there been room: no job that does the same needs
        less."""
        parts = [self.sizes[name] for name in ("allocated", "tried") if name in self.sizes]
        return total(parts).as_floor() if len(parts) == 2 else None

    def bytes(self, name: str) -> int | None:
        """One of the sizes; `None` if the message does not give it."""
        return self.sizes[name].bytes if name in self.sizes else None

    def shortage(self) -> OutOfMemory | None:
        """The numbers as a record holds them; `None` for a message without them."""
        names = ("tried", "allocated", "reserved")
        if any(name not in self.sizes for name in names):
            return None
        tried, allocated, reserved = (self.sizes[name].bytes for name in names)
        limit = self.bytes("allowed")
        return OutOfMemory(
            phase=self.place.phase,
            step=None,
            tensor="",
            requested_bytes=tried,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            limit_bytes=reserved + (self.bytes("free") or 0) if limit is None else limit,
            holders={},
            free_bytes=self.bytes("free"),
            total_bytes=self.bytes("total"),
            rank=self.rank,
        )


def parse(text: str, *, rank: int | None = None, place: SaidPhase | None = None) -> Message | None:
    """The message in a text; `None` where there is none. Sizes that follow from others are filled
    in."""
    begin = _BEGINS.search(text)
    tried = _TRIED.search(text)
    if begin is None and (tried is None or not any(part.search(text) for part in _PARTS[:2])):
        return None
    sizes = {"tried": _reading(tried, "tried")} if tried else {}
    for part in _PARTS:
        if found := part.search(text, tried.start() if tried else 0):
            name = next(iter(part.groupindex))
            sizes.setdefault(name, _reading(found, name))
    others = {int(found[1]): _reading(found, "other") for found in _PROCESS.finditer(text)}
    gpu = _GPU.search(text, tried.start()) if tried else None
    return Message(_completed(sizes), int(gpu[1]) if gpu else None, rank, place or SaidPhase(), others)


def _completed(sizes: dict[str, Reading]) -> dict[str, Reading]:
    """With reserved from its parts or the other way round, and what whatever is not this allocator
    uses."""
    allocated = sizes.get("allocated")
    if allocated and "unallocated" in sizes:
        sizes.setdefault("reserved", total([allocated, sizes["unallocated"]]))
    if allocated and "reserved" in sizes:
        sizes.setdefault("unallocated", _less(sizes["reserved"], allocated))
    if all(name in sizes for name in ("total", "free", "reserved")):
        sizes["beside"] = _less(_less(sizes["total"], sizes["free"]), sizes["reserved"])
    return sizes


def _less(whole: Reading, part: Reading) -> Reading:
    return Reading(max(0, whole.bytes - part.bytes), whole.rounding + part.rounding)


def _reading(found: re.Match[str], name: str) -> Reading:
    number, unit = found[name], _UNITS[found[f"{name}_unit"]]
    return rounded(number, unit, len(number.partition(".")[2]))


class OutOfMemoryReader:
    """Reads the messages of all ranks, with the traceback that each has above it; the rank that
    needed most is told."""

    format = "out-of-memory message of torch"
    marks = ("out of memory", "tried to allocate", *FRAME_MARKS)

    def __init__(self) -> None:
        self.assumed = SaidPhase()
        """Where a message is of whose traceback does not say it."""
        self._frames: dict[str, Frames] = {}
        self._open: dict[str, list[str]] = {}
        self._waiting: dict[str, int] = {}
        """Whose message goes on, the longest silent first: after how many lines they spoke last."""
        self._lines = 0
        self._seen: dict[object, set[int | None]] = {}
        self.messages: list[Message] = []

    @property
    def is_open(self) -> bool:
        """Whether a message or a frame of somebody's goes on."""
        return bool(self._waiting)

    def line(self, line: LogLine) -> int:
        """Read one line; how many it explains. Frames of a traceback are kept, and counted with the
        message that they lead to."""
        frames = self._frames.setdefault(line.speaker, Frames()) if len(self._frames) < MOST else Frames()
        count = self._line(line, frames)
        self._lines += 1
        self._waiting.pop(line.speaker, None)
        if line.speaker in self._open or frames.code_follows:
            self._waiting[line.speaker] = self._lines
        self._give_up_on_the_silent()
        return count

    def _give_up_on_the_silent(self) -> None:
        """A rank that was killed in the middle of a message never ends it."""
        while self._waiting and self._lines - next(iter(self._waiting.values())) > PATIENCE:
            speaker = next(iter(self._waiting))
            del self._waiting[speaker]
            self._frames.get(speaker, Frames()).code_follows = False
            self._close(speaker)

    def _line(self, line: LogLine, frames: Frames) -> int:
        began = self._open.get(line.speaker)
        if began is not None:
            return self._continued(line, began, frames)
        message = parse(line.text)
        if message is None:
            return int(frames.line(line.text))
        if not any(name in message.sizes for name in _LAST):
            self._open[line.speaker] = [line.text]
        else:
            self._keep(line.text, line, frames)
        return 1

    def finding(self) -> Finding | None:
        """What the message of the rank that needed most says."""
        self._end()
        worst = self.worst
        if worst is None:
            return None
        place, needed = worst.place, worst.needed
        where = f" in {place.phase}" if place.phase else ""
        who = f" on {worst.who}" if worst.who else ""
        failure = f"out of memory{who}{where}" + (f" ({place.evidence})" if place.evidence else "")
        ranks = {m.rank if m.rank is not None else m.gpu for m in self.messages}
        notes = [failure + (f", which needed most of {len(ranks)}" if len(ranks) > 1 else "")]
        if needed:
            notes.append("peaks are what was allocated then and what was asked for: the job needs at least so much")
        highest_rank = max((m.rank for m in self.messages if m.rank is not None), default=-1)
        return Finding(
            self.format, _floors(worst), notes=tuple(f"{self.format}: {n}" for n in notes), ranks=highest_rank + 1, failure=failure,
            shortage=worst.shortage(),
        )  # fmt: skip

    @property
    def worst(self) -> Message | None:
        """The message of the rank that needed most."""
        self._end()
        worst = max(self.messages, key=lambda m: (m.needed.bytes if m.needed else -1, m.place.phase is not None), default=None)
        return worst if worst is None or worst.place.phase else replace(worst, place=self._place_of_others())

    def _place_of_others(self) -> SaidPhase:
        """Where the other ranks were, if they agree; else what the log says."""
        found = {m.place.phase: m for m in self.messages if m.place.phase}
        if len(found) != 1:
            return self.assumed
        (other,) = found.values()
        return SaidPhase(other.place.phase, f"{other.who or 'another rank'}: {other.place.evidence}")

    def _continued(self, line: LogLine, began: list[str], frames: Frames) -> int:
        """One more line of a message that was broken into several; it ends with its last number, or
        where another begins."""
        text = " ".join([*began, line.text.strip()])
        before, now = parse(" ".join(began)), parse(text)
        grown = now is not None and before is not None and len(now.sizes) > len(before.sizes)
        is_another = _BEGINS.search(line.text) or line.text.lstrip().startswith(("File ", "Traceback"))
        if now is not None and any(name in now.sizes for name in _LAST) and not is_another:
            self._keep(text, line, frames)
            del self._open[line.speaker]
            return 1
        if is_another or len(began) >= _WRAPPED_LINES:
            self._keep(" ".join(began), line, frames)
            del self._open[line.speaker]
            return self._line(line, frames)
        began.append(line.text.strip())
        return int(grown)

    def _keep(self, text: str, line: LogLine, frames: Frames) -> None:
        """Keep a message, once: a launcher repeats what a rank has said."""
        message = parse(text, rank=line.rank, place=frames.place())
        if message is None or len(self.messages) >= MOST:
            return
        ranks = self._seen.setdefault((message.gpu, tuple(sorted((name, r.bytes) for name, r in message.sizes.items()))), set())
        if not ranks or (message.rank is not None and message.rank not in ranks):
            ranks.add(message.rank)
            self.messages.append(message)

    def _end(self) -> None:
        for speaker in list(self._open):
            self._close(speaker)

    def _close(self, speaker: str) -> None:
        """What a speaker has begun, if anything, is over."""
        if (began := self._open.pop(speaker, None)) is not None:
            self._keep(" ".join(began), LogLine("", speaker), self._frames.get(speaker, Frames()))


def _floors(message: Message) -> dict[str, Reading]:
    """What the message proves: what was allocated and asked for is below the peak of its phase,
    which is below that of the whole run."""
    readings: dict[str, Reading] = {}
    phase, needed = message.place.phase, message.needed
    if needed:
        readings["run_peak_allocated_bytes"] = needed
        if phase in TRAINING:
            readings["peak_allocated_bytes"] = needed
        if phase:
            readings[f"phases.{phase}.peak_bytes"] = needed
    if reserved := message.sizes.get("reserved"):
        readings["reserved_bytes"] = reserved.as_floor()
    has, free = message.sizes.get("total"), message.sizes.get("free")
    if has and free:
        readings["device_bytes"] = _less(has, free).as_floor()
    return readings
