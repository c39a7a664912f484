"""Records as a pandas frame, as CSV and as Markdown. In a frame and in CSV bytes are integers; in
Markdown a person reads GiB."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bf16prof.bounds import bound_notes
from bf16prof.reconcile import NAMES
from bf16prof.records import Case, MemoryRecord, Workload
from bf16prof.reports.asked import asked_lines
from bf16prof.reports.cells import Table
from bf16prof.reports.learning import learning
from bf16prof.reports.loss_table import loss_notes, loss_table
from bf16prof.reports.price_table import price_table
from bf16prof.reports.units import AS_PRINTED, CONSISTENT, EXACT, gib, number, seconds, signed_bytes, signed_percent
from bf16prof.reports.verdict import VERDICT, verdict
from bf16prof.reports.views import MEMORY_TOTALS, CaseView, case_label, loss_text, losses, run_names, run_views, total_text
from bf16prof.reports.written import csv_text, markdown_list, markdown_table, markdown_text
from bf16prof.runs import Run
from bf16prof.vocabulary import Component, Device, Phase, Source

if TYPE_CHECKING:
    import pandas as pd

_WHOLE = (
    "zero_stage", "world_size", "sequence_parallel", "tensor_parallel", "pipeline_parallel", "expert_parallel", "parameters",
    "steps_loss_not_finite", "sequence_length", "micro_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_FLOATS = (
    "step_time_s", "step_time_iqr_s", "step_time_floor_s", "step_time_error_s", "host_overhead_s", "tokens_per_s", "mfu", "hfu", "loss",
)  # fmt: skip
_LEARNING = ("lost_updates", "edq")
_WORK = (
    "tokens", "forward_flops", "backward_flops", "recomputed_flops", "sent_bytes", "optimizer_read_bytes", "optimizer_written_bytes",
    "host_link_bytes",
)  # fmt: skip


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per record: the case, every total, `components.<name>` between steps,
    `peak_components.<name>`, phases, times and loss.

    Bytes are nullable integers (Int64), what is not known is missing. There is one column
    `error.<quantity>` for each quantity that has an error, filled for the source of the row, and a
    column `run` if there are several: the same case of two runs is compared within its run.
    """
    import pandas as pd

    records = [record for run in runs for record in run.records]
    rows = [_row(record) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row)) or list(_row_names())
    columns = {name: _column(name, [row.get(name) for row in rows]) for name in names}
    if len(runs) > 1:
        named = [name for name, run in zip(run_names(runs), runs, strict=True) for _ in run.records]
        columns = {"run": pd.Series(named, dtype="object"), **columns}
    return pd.DataFrame({**columns, **_error_columns(run_views(runs), records)})


def to_csv(runs: Sequence[Run]) -> str:
    """The frame as CSV. No text in it can be taken for a formula by a spreadsheet; what is not
    known is empty."""
    table = frame(runs)
    for name in [name for name, dtype in table.dtypes.items() if str(dtype) == "object"]:
        table[name] = table[name].map(csv_text, na_action="ignore")
    return table.to_csv(index=False, lineterminator="\n")


def to_markdown(runs: Sequence[Run]) -> str:
    """Markdown tables with one row per record: its totals and errors, its components, those at its
    peak. Empty columns are left out.

    Where a job does not fit, or may not, a line under the first table says why. Losses, and what
    updates cost, have tables with one row per case.
    """
    views = run_views(runs)
    known = [(view, record) for view in views for record in view.records.values()]
    steady = [_components(view, record, record.components) for view, record in known if record.components]
    peak = [_components(view, record, record.peak_components) for view, record in known if record.peak_components]
    shortages = [(view, said) for view, record in known if (said := verdict(record)) and not said.fits]
    text = "".join(f"{markdown_text(line, None)}\n\n" for line in asked_lines([record for _, record in known]))
    text += _markdown([_totals(view, record) for view, record in known])
    if shortages:
        text += "\n" + markdown_list(f"{markdown_text(view.label)}: {markdown_text(said.text, None)}" for view, said in shortages)
    if notes := bound_notes(record for _, record in known):
        text += "\n" + markdown_list(markdown_text(line, None) for line in notes)
    if found := loss_table(views):
        text += _captioned(found)
        if notes := loss_notes(views):
            text += "\n" + markdown_list(markdown_text(line, None) for line in notes)
    if price := price_table(views):
        text += _captioned(price)
    if steady:
        text += "\nComponents (they add up to what is allocated between steps):\n\n" + _markdown(steady)
    if peak:
        text += "\nAt the training peak (they add up to it):\n\n" + _markdown(peak)
    return text


def _captioned(table: Table) -> str:
    rows = [dict(zip(table.headers, (cell.text for cell in row), strict=True)) for row in table.rows]
    return f"\n{markdown_text(table.caption, None)}.\n\n" + _markdown(rows)


def _column(name: str, values: list[Any]) -> pd.Series[Any]:
    import pandas as pd

    if name in _FLOATS + _LEARNING:
        return _floats(values)
    if name in _WHOLE or name.startswith("work.") or "bytes" in name or "components." in name:
        return _integers(values)
    return pd.Series(values, dtype="object")


def _error_columns(views: Sequence[CaseView], records: Sequence[MemoryRecord]) -> dict[str, pd.Series[Any]]:
    """The errors of each quantity that has any, for each record the one of its own view."""
    errors = {
        (id(view.records[source]), comparison.quantity): error
        for view in views
        for comparison in view.comparisons
        for source, error in comparison.errors.items()
        if error is not None
    }
    quantities = [name for name in NAMES if any(quantity == name for _, quantity in errors)]
    return {f"error.{name}": _floats([errors.get((id(record), name)) for record in records]) for name in quantities}


def _row(record: MemoryRecord) -> dict[str, Any]:
    case = record.case
    said = verdict(record)
    row: dict[str, Any] = {
        "source": str(record.source),
        "profile": case.profile,
        "zero_stage": case.zero_stage,
        "world_size": case.world_size,
        "sequence_parallel": case.sequence_parallel,
        "tensor_parallel": case.tensor_parallel,
        "pipeline_parallel": case.pipeline_parallel,
        "expert_parallel": case.expert_parallel,
        "recipe": case.recipe,
        "offload": str(case.offload),
        "workload": case.workload,
        **_workload(record),
        "device": str(record.device),
        "gpu": record.gpu,
        "parameters": record.parameters,
        **{name: getattr(record, name) for name in MEMORY_TOTALS},
        "peak_phase": None if record.peak_phase is None else str(record.peak_phase),
        "verdict": str(said.answer) if said else None,
        "verdict_text": said.text if said else None,
        "out_of_memory": said.text if said and record.out_of_memory is not None else None,
        **{f"components.{c}": record.components.get(c, 0) if record.components else None for c in Component},
        **{f"peak_components.{c}": record.peak_components.get(c, 0) if record.peak_components else None for c in Component},
    }
    for phase in Phase:
        memory = record.phases.get(phase)
        row[f"phases.{phase}.peak_bytes"] = memory.peak_bytes if memory else None
        row[f"phases.{phase}.end_bytes"] = memory.end_bytes if memory else None
    row |= {f"work.{name}": getattr(record.work, name) if record.work else None for name in _WORK}
    found, curve = learning(record), losses(record)
    row |= {name: getattr(record, name) for name in _FLOATS}
    row["steps_loss_not_finite"] = sum(loss is None for _, loss in curve) if curve else None
    row |= {name: getattr(found, name) if found else None for name in _LEARNING}
    return row | {"at_least": "; ".join(record.at_least) or None, "notes": "; ".join(record.notes) or None}


def _workload(record: MemoryRecord) -> dict[str, Any]:
    """What was asked, in a column each; the DeepSpeed settings as JSON. `asked` is the line that
    stands over tables elsewhere."""
    fields = vars(record.workload) if record.workload else dict.fromkeys(f.name for f in dataclasses.fields(Workload))
    plain = {key: value for key, value in fields.items() if key not in ("deepspeed", "assumed")}
    deepspeed, assumed = fields["deepspeed"], fields["assumed"]
    return {
        **plain,
        "deepspeed": None if deepspeed is None else json.dumps(deepspeed),
        "assumed": None if assumed is None else ", ".join(assumed),
        "asked": next(iter(asked_lines([record])), None),
    }


def _row_names() -> list[str]:
    return list(_row(MemoryRecord(Source.ESTIMATE, Case("", 0, 1, ""), Device.GPU, 0)))


def _floats(values: Sequence[float | None]) -> pd.Series[Any]:
    import pandas as pd

    return pd.Series([float("nan") if value is None else value for value in values], dtype="float64")


def _integers(values: list[int | None]) -> pd.Series[Any]:
    import pandas as pd

    fits = all(value is None or -(2**63) <= value < 2**63 for value in values)
    return pd.Series(values, dtype="Int64" if fits else "object")


def _totals(view: CaseView, record: MemoryRecord) -> dict[str, str]:
    row = {"case": case_label(record.case), "run": view.run, "profile": record.case.profile, "source": str(record.source)}
    for name, label in MEMORY_TOTALS.items():
        row[label] = "" if getattr(record, name) is None else total_text(record, name)
        line = view.line(name)
        if line and record.source in line.consistent:
            row[f"{label} error"] = CONSISTENT
        if line and record.source in line.differences:
            error, difference = line.errors.get(record.source), line.differences[record.source]
            same = EXACT if not difference else AS_PRINTED if line.as_printed(record.source) else ""
            row[f"{label} error"] = same or f"{signed_bytes(difference)} ({signed_percent(error)})"
    said = verdict(record)
    row[VERDICT] = said.marked if said else ""
    row["step time"] = _known(record.step_time_s, seconds)
    row["step time floor"] = _known(record.step_time_floor_s, seconds)
    row["MFU"] = "" if record.mfu is None else f"{record.mfu:.1%}"
    row["tokens/s"] = _known(record.tokens_per_s, number)
    row["loss"] = loss_text(record) if losses(record) else _known(record.loss, number)
    return row


def _components(view: CaseView, record: MemoryRecord, sizes: Mapping[Component, int]) -> dict[str, str]:
    row = {"case": case_label(view.case), "run": view.run, "source": str(record.source)}
    return row | {str(component): gib(size) for component in Component if (size := sizes.get(component))}


_LEFT = ("case", "run", "profile", "source", VERDICT)


def _known(value: Any, show: Any) -> str:
    return "" if value is None else show(value)


def _markdown(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "No records.\n"
    longest_first = sorted(rows, key=lambda row: -len(row))
    names = [name for name in dict.fromkeys(n for row in longest_first for n in row) if any(row.get(name) for row in rows)]
    return markdown_table(names, [[markdown_text(row.get(name, "")) for name in names] for row in rows], _LEFT)
