"""Records as a pandas frame, as CSV and as Markdown. In a frame and in CSV bytes are integers; in Markdown a person reads GiB."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bf16prof.reconcile import Comparison
from bf16prof.records import Case, Component, Device, MemoryRecord, Phase, Source
from bf16prof.reports.units import gib, inert, number, seconds, signed_bytes, signed_percent
from bf16prof.reports.views import MEMORY_TOTALS, CaseView, case_label, run_views
from bf16prof.runs import Run

if TYPE_CHECKING:
    import pandas as pd

_WHOLE = ("zero_stage", "world_size", "parameters")
_FLOATS = ("step_time_s", "step_time_iqr_s", "tokens_per_s", "loss")
_FORMULA = re.compile(r"^\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_MARKDOWN = re.compile(r"([\\`*\[\]|~])")


def frame(records: Sequence[MemoryRecord], comparisons: Sequence[Comparison] | None = None) -> pd.DataFrame:
    """One row per record: the case, every total, `components.<name>`, `phases.<name>.peak_bytes` / `.end_bytes`, times and loss.

    Bytes are nullable integers (Int64), what is not known is missing. With `comparisons` there is one column `error.<quantity>` for each
    quantity that has an error, filled for the source of the row.
    """
    import pandas as pd

    rows = [_row(record) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row)) or list(_row_names())
    columns: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name in _FLOATS:
            columns[name] = pd.Series([float("nan") if v is None else v for v in values], dtype="float64")
        elif name in _WHOLE or "bytes" in name or name.startswith("components."):
            columns[name] = _integers(values)
        else:
            columns[name] = pd.Series(values, dtype="object")
    for quantity in dict.fromkeys(c.quantity for c in comparisons or [] if any(e is not None for e in c.errors.values())):
        found = {(c.case, c.device, s): e for c in comparisons or [] if c.quantity == quantity for s, e in c.errors.items()}
        errors = [found.get((r.case, r.device, r.source)) for r in records]
        columns[f"error.{quantity}"] = pd.Series([float("nan") if e is None else e for e in errors], dtype="float64")
    return pd.DataFrame(columns)


def to_csv(records: Sequence[MemoryRecord], comparisons: Sequence[Comparison] | None = None) -> str:
    """The frame as CSV. No text in it can be taken for a formula by a spreadsheet; what is not known is empty."""
    table = frame(records, comparisons)
    for name in [name for name, dtype in table.dtypes.items() if str(dtype) == "object"]:
        table[name] = table[name].map(csv_text, na_action="ignore")
    return table.to_csv(index=False, lineterminator="\n")


def csv_text(value: object) -> object:
    """A text for a cell of a CSV file: control characters escaped, and a quote before what a spreadsheet would calculate."""
    if not isinstance(value, str):
        return value
    return ("'" if _FORMULA.match(value) or value.startswith(("\t", "\r", "\n")) else "") + inert(value, limit=None)


def to_markdown(runs: Sequence[Run]) -> str:
    """Two Markdown tables with one row per record: its totals and errors, then its components. Columns without a value are left out."""
    views = run_views(runs)
    totals = [_totals(view, record) for view in views for record in view.records.values()]
    parts = [_components(view, record) for view in views for record in view.records.values() if record.components]
    text = _markdown(totals)
    if parts:
        text += "\nComponents (they add up to what is allocated between steps):\n\n" + _markdown(parts)
    return text


def markdown_text(value: str) -> str:
    """A text for a cell of a Markdown table: nothing in it is markup, and it stays on its line."""
    return html.escape(_MARKDOWN.sub(r"\\\1", inert(value)), quote=False)


def _row(record: MemoryRecord) -> dict[str, Any]:
    case = record.case
    row: dict[str, Any] = {
        "source": str(record.source),
        "profile": case.profile,
        "zero_stage": case.zero_stage,
        "world_size": case.world_size,
        "recipe": case.recipe,
        "offload": str(case.offload),
        "device": str(record.device),
        "gpu": record.gpu,
        "parameters": record.parameters,
        **{name: getattr(record, name) for name in MEMORY_TOTALS},
        "peak_phase": None if record.peak_phase is None else str(record.peak_phase),
        **{f"components.{c}": record.components.get(c, 0) if record.components else None for c in Component},
    }
    for phase in Phase:
        memory = record.phases.get(phase)
        row[f"phases.{phase}.peak_bytes"] = memory.peak_bytes if memory else None
        row[f"phases.{phase}.end_bytes"] = memory.end_bytes if memory else None
    return row | {name: getattr(record, name) for name in _FLOATS} | {"notes": "; ".join(record.notes) or None}


def _row_names() -> list[str]:
    return list(_row(MemoryRecord(Source.ESTIMATE, Case("", 0, 1, ""), Device.GPU, 0)))


def _integers(values: list[int | None]) -> pd.Series[Any]:
    import pandas as pd

    fits = all(value is None or -(2**63) <= value < 2**63 for value in values)
    return pd.Series(values, dtype="Int64" if fits else "object")


def _totals(view: CaseView, record: MemoryRecord) -> dict[str, str]:
    row = {"case": case_label(record.case), "profile": record.case.profile, "source": str(record.source)}
    for name, label in MEMORY_TOTALS.items():
        row[label] = _known(getattr(record, name), gib)
        line = view.line(name)
        if line and record.source in line.differences:
            error, difference = line.errors.get(record.source), line.differences[record.source]
            row[f"{label} error"] = f"{signed_bytes(difference)} ({signed_percent(error)})" if difference else "exact"
    row["step time"] = _known(record.step_time_s, seconds)
    row["tokens/s"] = _known(record.tokens_per_s, number)
    row["loss"] = _known(record.loss, number)
    return row


def _components(view: CaseView, record: MemoryRecord) -> dict[str, str]:
    row = {"case": case_label(view.case), "source": str(record.source)}
    return row | {str(component): gib(size) for component in Component if (size := record.components.get(component))}


def _known(value: Any, show: Any) -> str:
    return "" if value is None else show(value)


def _markdown(rows: list[dict[str, str]]) -> str:
    import pandas as pd

    if not rows:
        return "No records.\n"
    longest_first = sorted(rows, key=lambda row: -len(row))
    names = [name for name in dict.fromkeys(n for row in longest_first for n in row) if any(row.get(name) for row in rows)]
    table = pd.DataFrame([{name: markdown_text(row.get(name, "")) for name in names} for row in rows])
    left = ("case", "profile", "source")
    return str(table.to_markdown(index=False, disable_numparse=True, colalign=["left" if n in left else "right" for n in names])) + "\n"
