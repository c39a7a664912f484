"""The ranks of a measured case side by side: where each ran, what it held, how long it took, and
how far they are apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bf16prof.records import MemoryRecord, RankSummary
from bf16prof.reports.cells import Cell, Table, bytes_cell, unknown_cell
from bf16prof.reports.units import gib, inert, seconds, signed_percent
from bf16prof.vocabulary import Phase

HEADERS = ("rank", "host", "device", "allocated", "training peak", "whole-run peak", "reserved", "step time", "forward")
MOST_RANKS = 256
"""So many ranks are shown, those with the highest peaks."""


def several_hosts(record: MemoryRecord) -> bool:
    """Whether the ranks of a record ran on more than one node."""
    return len({rank.node for rank in record.ranks}) > 1


def ranks_table(record: MemoryRecord) -> Table | None:
    """One row per rank; `None` where there are not two of them."""
    if len(record.ranks) < 2:
        return None
    shown = sorted(record.ranks, key=lambda rank: -(rank.peak_allocated_bytes or 0))[:MOST_RANKS]
    rows = tuple(_row(rank) for rank in sorted(shown, key=lambda rank: rank.rank))
    left_out = f", the {MOST_RANKS} with the highest peaks of {len(record.ranks)}" if len(record.ranks) > MOST_RANKS else ""
    return Table(f"Ranks{left_out}", HEADERS, rows)


def _row(rank: RankSummary) -> tuple[Cell, ...]:
    sizes = (rank.allocated_bytes, rank.peak_allocated_bytes, rank.run_peak_allocated_bytes, rank.reserved_bytes)
    return (
        Cell(str(rank.rank), rank.rank, "number"),
        Cell(inert(rank.host)),
        Cell(inert(rank.device)),
        *(bytes_cell(size) for size in sizes),
        *(_time_cell(time) for time in (rank.step_time_s, rank.phase_time_s.get(Phase.FORWARD))),
    )


def _time_cell(value: float | None) -> Cell:
    return unknown_cell() if value is None else Cell(seconds(value), value, "number")


def imbalance(record: MemoryRecord) -> list[str]:
    """In words: which rank holds most, and how far apart the ranks are; which one the others wait
    for."""
    if len(record.ranks) < 2:
        return []
    peaks = [(rank.peak_allocated_bytes, rank) for rank in record.ranks if rank.peak_allocated_bytes is not None]
    forwards = [(rank.phase_time_s[Phase.FORWARD], rank) for rank in record.ranks if Phase.FORWARD in rank.phase_time_s]
    return [*_apart(peaks), *_straggler(forwards)]


def _apart(found: Sequence[tuple[int, RankSummary]]) -> list[str]:
    if not found:
        return []
    (most, worst), (least, _) = (choose(found, key=lambda pair: pair[0]) for choose in (max, min))
    if most == least:
        return [f"training peak: the same on all {len(found)} ranks"]
    return [f"training peak: {_name(worst)} has the highest, {gib(most)}, {gib(most - least)} more than the lowest"]


def _straggler(found: Sequence[tuple[float, RankSummary]]) -> list[str]:
    """Ranks wait for each other in collectives, so the slowest is told by its forward."""
    if not found:
        return []
    slowest, rank = max(found, key=lambda pair: pair[0])
    median = statistics.median(time for time, _ in found)
    if not median:
        return []
    return [f"forward: {_name(rank)} is slowest, {seconds(slowest)}, {signed_percent(slowest / median - 1)} over the median of the ranks"]


def _name(rank: RankSummary) -> str:
    return f"rank {rank.rank} ({inert(rank.host)}, {inert(rank.device)})" if rank.host else f"rank {rank.rank}"
