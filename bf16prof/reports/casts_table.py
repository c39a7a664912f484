"""The table of what lower precisions cannot hold, by kind of value."""

from __future__ import annotations

from bf16prof.records import MemoryRecord
from bf16prof.reports.cells import Cell, Table
from bf16prof.reports.units import inert, whole


def casts_table(record: MemoryRecord) -> Table | None:
    """Shares of the last watched step: which weights, gradients and updates a cast makes zero or
    infinite; `None` where nobody looked."""
    if not record.quality or not record.quality[-1].casts:
        return None
    last = record.quality[-1]
    dtypes = list(dict.fromkeys(name for found in last.casts.values() for name in found.zero))
    headers = ("values", "looked at", *(f"{what} in {name}" for name in dtypes for what in ("zero", "infinite")))
    rows = tuple(
        (
            Cell(inert(kind), style="label"),
            Cell(whole(found.values), found.values, "number"),
            *(_share(shares[name]) for name in dtypes for shares in (found.zero, found.infinite)),
        )
        for kind, found in last.casts.items()
    )
    return Table(f"Values that a cast makes zero or infinite, step {last.step}, {record.source}", headers, rows)


def _share(share: float) -> Cell:
    return Cell(f"{100 * share:.4f} %", share, "number")
