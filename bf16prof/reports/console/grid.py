"""The estimate grid: ZeRO stages and GPU counts down, precision recipes across, and in each cell
the bytes and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Console
from rich.text import Text

from bf16prof.profiles.gpus import gpu_named
from bf16prof.records import Case, MemoryRecord
from bf16prof.reports.console.asked import asked
from bf16prof.reports.console.layout import Column, heading, mark, note, safe, table
from bf16prof.reports.palette import CONSOLE
from bf16prof.reports.units import MESSAGE_LIMIT, gib, inert, seconds, signed_percent, whole
from bf16prof.reports.verdict import verdict
from bf16prof.vocabulary import Device, Offload

_Row = tuple[int, int, Offload, str]


class RefusalLike(Protocol):
    """A case that no engine can run, with the reason and the recipes that would work instead."""

    @property
    def case(self) -> Case:
        """The refused case."""

    @property
    def reason(self) -> str:
        """Why, in one line."""

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Recipes that would run."""


def estimate_grid(
    records: Sequence[MemoryRecord],
    refused: Sequence[RefusalLike],
    console: Console,
    *,
    textbook: Mapping[Case, Mapping[str, int]] | None = None,
) -> None:
    """Print one grid per profile and device.

    Cells of a GPU say what is left free, or what is missing. `textbook` adds one row per named rule
    (16N and the like) under each estimate, with its signed error against the estimate.
    """
    for profile, device in dict.fromkeys((r.case.profile, r.device) for r in records):
        chosen = [r for r in records if (r.case.profile, r.device) == (profile, device)]
        rejections = [r for r in refused if r.case.profile == profile]
        _one_grid(chosen, rejections, console, textbook or {})
    orphans = [r for r in refused if r.case.profile not in {record.case.profile for record in records}]
    if orphans:
        heading(console, "Refused")
        _footnotes(console, orphans, _numbered(orphans))


def grid_width(records: Sequence[MemoryRecord]) -> int:
    """About so many columns the grid of these records takes."""
    return 14 + 38 * len({record.case.recipe for record in records})


def refusals(refused: Sequence[RefusalLike], console: Console) -> None:
    """Print why cases were refused, each reason once."""
    _footnotes(console, refused, _numbered(refused))


def _one_grid(
    records: Sequence[MemoryRecord],
    refused: Sequence[RefusalLike],
    console: Console,
    textbook: Mapping[Case, Mapping[str, int]],
) -> None:
    numbers = _numbered(refused)
    cells: dict[tuple[_Row, str], Text] = {}
    for record in records:
        cells[_row(record.case, str(record.source)), record.case.recipe] = _cell(record, console)
        for name, size in textbook.get(record.case, {}).items():
            cells[_row(record.case, name), record.case.recipe] = _textbook_cell(size, record)
    for refusal in refused:
        source = next((str(r.source) for r in records), "estimate")
        cells[_row(refusal.case, source), refusal.case.recipe] = Text(f"- [{numbers[refusal.reason]}]", "dim")
    _title(console, records[0])
    asked(records, console)
    _print(console, cells)
    _captions(console, records)
    _footnotes(console, refused, numbers)


def _row(case: Case, kind: str) -> _Row:
    return (case.zero_stage, case.world_size, case.offload, kind)


def _title(console: Console, record: MemoryRecord) -> None:
    parts, gpu = [inert(record.case.profile), f"{whole(record.parameters)} parameters"], gpu_named(record.gpu)
    if gpu is not None:
        parts.append(f"on {gpu.name} with {gib(gpu.memory_bytes)}")
    heading(console, ", ".join(parts))


def _print(console: Console, cells: Mapping[tuple[_Row, str], Text]) -> None:
    recipes = list(dict.fromkeys(recipe for _, recipe in cells))
    rows = sorted({row for row, _ in cells}, key=lambda row: row[:3])
    order = list(dict.fromkeys(row[3] for row, _ in cells))
    rows.sort(key=lambda row: (row[0], row[1], row[2], order.index(row[3])))
    offload = any(row[2] is not Offload.NONE for row in rows)
    keys = [Column("ZeRO", key=True), Column("GPUs", key=True)]
    keys += [Column("offload", "left", key=True)] if offload else []
    keys += [Column("by", "left", key=True)] if len(order) > 1 else []
    body: list[list[Text | str]] = []
    last: tuple[int, int, Offload] | None = None
    for stage, world, place, kind in rows:
        first = last != (stage, world, place)
        last = (stage, world, place)
        line: list[Text | str] = [str(stage) if first else "", str(world) if first else ""]
        line += [str(place) if first else ""] if offload else []
        line += [safe(kind, "" if first else "dim")] if len(order) > 1 else []
        body.append(line + [cells.get(((stage, world, place, kind), recipe), "") for recipe in recipes])
    table(console, [*keys, *(Column(inert(recipe)) for recipe in recipes)], body)


def _cell(record: MemoryRecord, console: Console) -> Text:
    text = Text(gib(record.allocated_bytes), "bold")
    if record.peak_allocated_bytes is not None:
        text.append(f"\npeak {gib(record.peak_allocated_bytes)}", "not bold")
        if (record.run_peak_allocated_bytes or 0) > record.peak_allocated_bytes:
            text.append(f"\ninit {gib(record.run_peak_allocated_bytes)}", "not bold")
    if record.step_time_s is not None:
        error = f" ± {seconds(record.step_time_error_s)}" if record.step_time_error_s is not None else ""
        text.append(f"\nstep {seconds(record.step_time_s)}{error}", "not bold")
    if found := verdict(record):
        text.append(f"\n{mark(console, found.style)} {found.short}", f"not bold {CONSOLE[found.style]}")
    return text


def _textbook_cell(size: int, record: MemoryRecord) -> Text:
    text = Text(gib(size), "dim")
    if record.allocated_bytes:
        text.append(f" {signed_percent(size / record.allocated_bytes - 1)}")
    return text


def _captions(console: Console, records: Sequence[MemoryRecord]) -> None:
    rank = "GPU" if records[0].device is Device.GPU else "rank"
    note(console, f"Bytes allocated between steps (steady state), per {rank}; 1 GiB = 2^30 bytes.")
    judged = any(verdict(record) for record in records)
    if judged:
        note(
            console,
            "Fits, tight (the bytes fit, the caching allocator's share may not) or does not fit: in the GPU's memory less CUDA context and "
            "NCCL buffers (assumed), for the whole run.",
        )
    unknown = sum(record.peak_allocated_bytes is None for record in records)
    if unknown:
        which = "The peak" if unknown == len(records) else f"In {unknown} of {len(records)} cells the peak"
        shown = "whether it fits is judged by the steady state, which is lower." if judged else "the steady state is shown, which is lower."
        note(console, f"{which} is not known by this source yet: {shown}")


def _numbered(refused: Sequence[RefusalLike]) -> dict[str, int]:
    reasons = dict.fromkeys(refusal.reason for refusal in refused)
    return {reason: number for number, reason in enumerate(reasons, start=1)}


def _footnotes(console: Console, refused: Sequence[RefusalLike], numbers: Mapping[str, int]) -> None:
    for reason, number in numbers.items():
        same = [refusal for refusal in refused if refusal.reason == reason]
        recipes = ", ".join(inert(name) for name in dict.fromkeys(refusal.case.recipe for refusal in same))
        text = Text(f"[{number}] {recipes}: {inert(reason, MESSAGE_LIMIT)}")
        others = list(dict.fromkeys(name for refusal in same for name in refusal.alternatives))
        if others:
            text.append(f"; instead: {', '.join(inert(name) for name in others)}")
        console.print(text)
