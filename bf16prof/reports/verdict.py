"""The verdict on a record in words: the same in console, HTML, Markdown and CSV. `bf16prof.verdict`
judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bf16prof.reconcile import REFERENCES
from bf16prof.records import MemoryRecord, OutOfMemory
from bf16prof.reports import palette
from bf16prof.reports.units import gib, inert, part_of
from bf16prof.reports.views import CaseView, component_name
from bf16prof.verdict import Judgement, device_total, judge
from bf16prof.vocabulary import Phase, Source, Verdict

VERDICT = "verdict"
"""The column of tables; "fits", "tight" or "does not fit", with what is free or lacks."""

_HOLDERS = 4
_ORDINALS = ("first", "second", "third")

Style = Literal["good", "warn", "bad"]

STYLES: dict[Verdict, Style] = {Verdict.FITS: "good", Verdict.TIGHT: "warn", Verdict.DOES_NOT_FIT: "bad"}
"""How each verdict looks: a class of the page's style sheet, a colour of the console and a symbol
(`palette.py`)."""


@dataclass(frozen=True)
class Said:
    """A verdict in two words or so, and with the numbers that decide."""

    answer: Verdict
    short: str
    text: str

    @property
    def fits(self) -> bool:
        """Whether it fits, with nothing more to try."""
        return self.answer is Verdict.FITS

    @property
    def style(self) -> Style:
        """How it looks."""
        return STYLES[self.answer]

    @property
    def symbol(self) -> str:
        """Its symbol."""
        return palette.SYMBOLS[self.style]

    @property
    def marked(self) -> str:
        """The short form behind its symbol."""
        return f"{self.symbol} {self.short}"


def verdict(record: MemoryRecord) -> Said | None:
    """The verdict on a record; `None` where its source cannot tell."""
    found = judge(record)
    return None if found is None else Said(found.verdict, _short(found), _text(record, found))


def case_verdict(view: CaseView) -> Said | None:
    """The verdict on a case: of what ran, else of its dry run, else of its estimate."""
    order = (Source.MEASURE, Source.IMPORT, Source.SIMULATE, Source.ESTIMATE)
    records = (view.records.get(source) for source in order)
    return next((said for record in records if record is not None and (said := verdict(record))), None)


def prediction_text(record: MemoryRecord) -> str:
    """What a prediction had said, to stand beside a failure: "estimate: 14.60 GiB allocated,
    training peak 19.17 GiB"."""
    peak = "unknown" if record.peak_allocated_bytes is None else gib(record.peak_allocated_bytes)
    said = verdict(record)
    return f"{record.source}: {gib(record.allocated_bytes)} allocated, training peak {peak}" + (f", {said.short}" if said else "")


def beside_the_allocator(record: MemoryRecord) -> str:
    """What the device holds besides the reserved bytes, each with what was assumed; empty where
    nothing is known of it."""
    parts = [f"{inert(item.name)} {gib(item.bytes)}" + (f" ({inert(item.source)})" if item.source else "") for item in record.device_items]
    return f"on the device besides the allocator: {', '.join(parts)}" if parts else ""


def _short(found: Judgement) -> str:
    free = found.free_bytes
    if free is None or (found.verdict is not Verdict.FITS and free >= 0):
        return str(found.verdict)
    words = {Verdict.FITS: "free", Verdict.TIGHT: "short", Verdict.DOES_NOT_FIT: "too much"}
    return f"{found.verdict}, {gib(abs(free))} {words[found.verdict]}"


def _text(record: MemoryRecord, found: Judgement) -> str:
    where = f"{' on' if found.verdict is Verdict.TIGHT else ''} {inert(record.gpu)}" if record.gpu else ""
    parts = [_peak(found), _reserved(record, found)]
    if record.device_bytes is not None and found.verdict is Verdict.FITS:
        parts.append(f"{part_of(record.device_bytes, device_total(record))} on the device")
    if record.allocator_retries and record.out_of_memory is None:
        one = record.allocator_retries == 1
        parts.append(f"{record.allocator_retries:,} allocation{'s find' if not one else ' finds'} room only after the cache is freed")
    if record.inside_zero_init_bytes is not None:
        inside = gib(record.inside_zero_init_bytes)
        parts.append(f"only init does not fit: init {gib(found.peak_bytes)}; inside deepspeed.zero.Init {inside} (--zero-init)")
    if record.out_of_memory is not None:
        parts.append(_shortage(record, record.out_of_memory, bytes_fit=found.verdict is Verdict.TIGHT))
    return f"{found.verdict}{where}: " + "; ".join(part for part in parts if part)


def _peak(found: Judgement) -> str:
    whose = {None: "the run's peak", Phase.INIT: "init's peak", Phase.EVAL: "the evaluation's peak"}.get(found.phase, "the step's peak")
    phase = f" ({found.phase})" if found.phase not in (None, Phase.INIT) else ""
    said = f"{whose} is {gib(found.peak_bytes)}{phase}"
    if found.limit_bytes is None:
        return said
    if found.verdict is Verdict.DOES_NOT_FIT:
        over = found.peak_bytes - found.limit_bytes
        return f"{said}, {gib(over)} too much" if over > 0 else said
    return f"{said} of the {gib(found.limit_bytes)} that the allocator may reserve"


def _reserved(record: MemoryRecord, found: Judgement) -> str:
    if found.verdict is Verdict.DOES_NOT_FIT or record.source is Source.IMPORT:
        return ""
    replayed = record.source is Source.ESTIMATE
    margin = f" of {gib(found.room_bytes)} ({found.margin:.0%} kept for what the replay does not know)" if found.margin else ""
    if found.reserved_bytes is not None:
        return f"{gib(found.reserved_bytes)} reserved" + (f" by the replayed allocator{margin}" if replayed else "")
    if not replayed:
        return ""
    if found.verdict is Verdict.FITS:
        return "far from what fragmentation could take"
    return f"more than {gib(found.room_bytes)}, which is that less {found.margin:.0%} for fragmentation" if found.margin else ""


def _shortage(record: MemoryRecord, shortage: OutOfMemory, *, bytes_fit: bool) -> str:
    holders = sorted(((size, c) for c, size in shortage.holders.items() if size * 100 >= shortage.allocated_bytes), key=lambda h: -h[0])
    biggest = ", ".join(f"{component_name(component)} {gib(size)}" for size, component in holders[:_HOLDERS])
    fragmented = bytes_fit and shortage.allocated_bytes + shortage.requested_bytes <= shortage.limit_bytes
    happened = "ran" if record.source in REFERENCES else "runs"
    where = _instant(shortage)
    what = f" for `{inert(shortage.tensor)}`" if shortage.tensor else ""
    return (
        f"it {happened} out of memory{f' in {where}' if where else ''}, allocating {gib(shortage.requested_bytes)}{what}: "
        f"{gib(shortage.allocated_bytes)} allocated, {part_of(shortage.reserved_bytes, shortage.limit_bytes)} reserved"
        + ("; without fragmentation there would be room" if fragmented else "")
        + (f"; biggest holders: {biggest}" if biggest else "")
        + ("" if record.source in REFERENCES else "; all other numbers are as if there were room")
    )


def _instant(shortage: OutOfMemory) -> str:
    step = shortage.step
    if shortage.phase is None:
        return ""
    if shortage.phase is Phase.INIT or step is None:
        return str(shortage.phase)
    which = f"the {_ORDINALS[step]} step" if step < len(_ORDINALS) else f"step {step} (counted from 0)"
    return f"the {shortage.phase} phase of {which}"
