"""What a record knows of the work of a step, as rows for console and HTML: operations, collectives,
the optimizer, times."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.records import MemoryRecord
from bf16prof.reports.units import gib, inert, scaled, seconds, share
from bf16prof.step_records import StepWork, Transfer

Row = tuple[str, str, str]
"""What, how much, and where it comes from or what it means."""

HEADERS = ("work of one rank in one step", "amount", "of it")


def work_rows(record: MemoryRecord) -> list[Row]:
    """One row per kind of work; none where it is not known."""
    work, exchanges = record.work, _transfers(record.exchanges)
    return (
        exchanges if work is None else [*_compute(work), *_transfers(work.transfers), *exchanges, *_optimizer(work), *_times(record, work)]
    )


def _compute(work: StepWork) -> list[Row]:
    per_token = f"{scaled(work.model_flops / work.tokens)}FLOP per token" if work.tokens else ""
    rows = [(f"model operations ({inert(work.compute_dtype)})", f"{scaled(work.model_flops)}FLOP", per_token)]
    if work.recomputed_flops:
        part = share(work.recomputed_flops, work.hardware_flops)
        rows.append(("recomputed by activation checkpointing", f"{scaled(work.recomputed_flops)}FLOP", f"{part} of all operations"))
    return rows


def _transfers(transfers: Sequence[Transfer]) -> list[Row]:
    rows = []
    for transfer in transfers:
        outside = f", {gib(transfer.between_nodes_bytes)} to other nodes" if transfer.between_nodes_bytes else ""
        name = f"sent: {inert(transfer.name)}, {transfer.collective}"
        rows.append((name, gib(transfer.sent_bytes), f"{transfer.calls:,} x in {transfer.phase}{outside}"))
    return rows


def _optimizer(work: StepWork) -> list[Row]:
    rows = [("optimizer: read and written", gib(work.optimizer_bytes), f"{gib(work.optimizer_written_bytes)} written")]
    if work.host_link_bytes:
        rows.append(("between device and host", gib(work.host_link_bytes), "offloaded gradients and parameters"))
    return rows


def _times(record: MemoryRecord, work: StepWork) -> list[Row]:
    rows = []
    if record.step_time_floor_s is not None:
        parts = ", ".join(f"{inert(name)} {seconds(value)}{_hidden(work, name)}" for name, value in work.floor_s.items())
        rows.append(("step time: floor (a bound, not a prediction)", seconds(record.step_time_floor_s), parts))
    if record.step_time_error_s is not None:
        overhead = f", {seconds(record.host_overhead_s)} of it host overhead" if record.host_overhead_s is not None else ""
        bar = f"± {seconds(record.step_time_error_s)}, see the note{overhead}"
        rows.append(("step time: calibrated", seconds(record.step_time_s), bar))
    if record.mfu is not None and record.hfu is not None:
        rows.append(("model FLOPs utilisation (MFU)", f"{record.mfu:.1%}", f"hardware FLOPs utilisation (HFU) {record.hfu:.1%}"))
    return rows


def _hidden(work: StepWork, part: str) -> str:
    """What a part takes beside computation, which the floor has only once."""
    hidden = work.hidden_s.get(part)
    return f" ({seconds(hidden)} more behind compute)" if hidden else ""
