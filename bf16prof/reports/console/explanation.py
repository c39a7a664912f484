"""An out-of-memory message in words: the numbers, what follows from them, what was predicted, what
would fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bf16prof.explanations import Explanation, Prediction
from bf16prof.plans import Change
from bf16prof.reports.console.layout import Column, heading, mark, note, table
from bf16prof.reports.units import AT_LEAST, CONSISTENT, gib, inert, share
from bf16prof.reports.views import quantity_name

_AMOUNTS = (Column("", "left", key=True), Column("size"), Column("bytes"), Column("", "left"))
_CHANGES = (Column("change", "left", key=True), Column("saves"), Column("needs"), Column("flag", "left"))


def explanation_view(found: Explanation, proved: Sequence[tuple[str, int, bool]], console: Console) -> None:
    """Print an explanation. `proved`: what a log without a message says, as (quantity, bytes,
    whether it is a lower bound)."""
    if found.failure:
        heading(console, Text(f"{mark(console, 'bad')} {inert(found.failure, 400)}"))
    else:
        heading(console, "No out-of-memory message there. What is said of memory:")
        table(console, (Column("quantity", "left", key=True), Column("size")), [_proved(*row) for row in proved])
    if found.amounts:
        rows = [
            [a.name, (AT_LEAST if "at least" in a.name else "") + gib(a.bytes), f"{a.bytes:,}", inert(a.meaning, 200)]
            for a in found.amounts
        ]
        table(console, _AMOUNTS, rows)
    for text in found.advice:
        console.print(Text(f"  {text}"))
    if found.prediction is not None:
        _predicted(found.prediction, console)
    if found.start is not None:
        _changes(found, console)
    if found.why_not_predicted:
        note(console, inert(found.why_not_predicted, 400))


def _proved(quantity: str, size: int, is_floor: bool) -> list[Text | str]:
    return [quantity_name(quantity), (AT_LEAST if is_floor else "") + gib(size)]


def _predicted(found: Prediction, console: Console) -> None:
    where = f"{found.phase} of {inert(found.case)}" if found.phase else f"the whole run of {inert(found.case)}"
    heading(console, f"Predicted for {where}: {gib(found.peak_bytes)}")
    if found.needed_bytes is not None:
        proved = f"the message proves {AT_LEAST}{gib(found.needed_bytes)}"
        if found.is_consistent:
            console.print(Text(f"{mark(console, 'good')} {CONSISTENT}: {proved}", "green"))
        else:
            below = f"{gib(found.missing_bytes)} ({share(found.missing_bytes, found.needed_bytes)}) below"
            console.print(Text(f"{mark(console, 'warn')} {below}: {proved}", "yellow"))
            console.print(
                Text("  the job is another than the one that was described (sequence length, micro-batch, ...), or more is held beside it")
            )
    if found.limit_bytes is not None:
        over = found.peak_bytes - found.limit_bytes
        said = f"{gib(over)} too much" if over > 0 else f"{gib(-over)} less"
        console.print(Text(f"  the allocator could have {gib(found.limit_bytes)}: {said}"))
    phases = ", ".join(f"{phase} {gib(size)}" for phase, size in found.phases.items())
    console.print(Text(f"  peak by phase: {phases}"))


def _changes(found: Explanation, console: Console) -> None:
    start = found.start
    assert start is not None, "asked for"
    missing = found.prediction.missing_bytes if found.prediction else 0
    where = f" on {inert(found.judged_on)}"
    also = f", with the {gib(missing)} that the prediction lacks on top" if missing else ""
    if start.free_bytes >= missing:
        heading(
            console, f"By the prediction the job fits{where}: {gib(start.peak_bytes)}, {gib(start.free_bytes)} less than there is room for"
        )
    elif found.fits_with:
        heading(console, f"What would fit{where}{also}")
        _table(found.fits_with, console)
    else:
        heading(console, f"No change fits{where}{also}; these save most")
        _table(found.saves, console)


def _table(changes: Sequence[Change], console: Console) -> None:
    rows: list[list[Text | str]] = [[inert(c.what, 120), gib(c.saved_bytes), gib(c.plan.peak_bytes), inert(c.flag, 300)] for c in changes]
    table(console, _CHANGES, rows)
