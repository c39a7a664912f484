"""The section "Memory over one step" of the HTML report: one panel per case, of which the page
shows one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.records import MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.cells import Cell, Table, bytes_cell, unknown_cell
from bf16prof.reports.plots import Figure
from bf16prof.reports.step_figure import STACK, step_figure
from bf16prof.reports.treemap import layer_map, treemap
from bf16prof.reports.units import gib, inert, share
from bf16prof.reports.verdict import Said, beside_the_allocator, verdict
from bf16prof.reports.views import PEAK_ITEMS, CaseView, component_name, largest
from bf16prof.reports.waterfall import is_off, waterfall
from bf16prof.runs import Run
from bf16prof.vocabulary import Component

MOST_PANELS = 24
MANY = 4
"""Beyond so many timelines each is drawn, and kept in the page, with fewer points."""

POINTS, FEW_POINTS = 1000, 600
"""So many are as fine as a screen; the highest of neighbours is kept, so that no peak is lost."""


CAPTIONS = {
    "step": "Allocated memory over the last step of the run, after each allocation and free. Dotted lines part the phases: F is forward, "
    "B backward, S step where their names have no room.",
    "map": "Each area is a tensor, or a kind of tensor, that is alive at the training peak; point at one for its name and size.",
    "layers": "Each area is what one layer allocated of a component while it ran and is alive at the training peak, in the colours above. "
    "Model states, buckets, the loss and autograd's own gradients are of no single layer.",
    "errors": "What the measurement has more or less than the prediction, component by component.",
}
"""The figures of a panel, in the order of the page, and what is said below each."""


@dataclass(frozen=True)
class Panel:
    """What one record knows of the inside of a step: whether it has room, figures, the names and
    colours of its components, and tables of what is alive at the peak.

    `figures` by the names of `CAPTIONS`; one that has nothing to show is left out.
    """

    id: str
    label: str
    verdict: Said | None
    figures: Mapping[str, Figure]
    components: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def panels(views: Sequence[CaseView]) -> tuple[list[Panel], int]:
    """Panels of the records that know a timeline or what is alive at their peak, and how many such
    records are left out."""
    most_first = [(v, r) for v in views for r in sorted(v.records.values(), key=lambda r: r.timeline is None)]
    known = [(v, r) for v, r in most_first if r.timeline or r.peak_components or _missed(v, r)]
    counts = {id(view): sum(view is other for other, _ in known) for view, _ in known}
    made = [
        _panel(f"step-{index}", view.label + (f", {record.source}" if counts[id(view)] > 1 else ""), view, record)
        for index, (view, record) in enumerate(known[:MOST_PANELS])
    ]
    return made, len(known) - len(made)


def _missed(view: CaseView, record: MemoryRecord) -> bool:
    """Whether a measurement found other bytes in some component than this prediction."""
    reference = view.reference
    return bool(reference and reference is not record and is_off(record, reference))


def with_thin_timelines(runs: Sequence[Run]) -> list[Run]:
    """The runs with their timelines as the page draws and keeps them."""
    points = POINTS if sum(record.timeline is not None for run in runs for record in run.records) <= MANY else FEW_POINTS
    return [dataclasses.replace(run, records=tuple(_thin(record, points) for record in run.records)) for run in runs]


def _thin(record: MemoryRecord, points: int) -> MemoryRecord:
    return record if record.timeline is None else dataclasses.replace(record, timeline=record.timeline.thinned(points))


def _panel(id_: str, label: str, view: CaseView, record: MemoryRecord) -> Panel:
    alive = [c for c in STACK if record.peak_components.get(c) or (record.timeline and any(record.timeline.components.get(c, ())))]
    reference = view.reference
    figures = {
        "step": step_figure(f"figure-{id_}", record, record.timeline) if record.timeline else None,
        "map": treemap(f"figure-map-{id_}", record),
        "layers": layer_map(f"figure-layers-{id_}", record),
        "errors": waterfall(f"figure-errors-{id_}", record, reference) if reference and reference is not record else None,
    }
    return Panel(
        id_,
        label,
        verdict(record),
        {name: drawn for name, drawn in figures.items() if drawn},
        tuple((component_name(c), palette.COMPONENTS[c]) for c in alive),
        tuple(table for table in (_component_table(record), _item_table(record)) if table.rows),
        tuple(text for text in (_earlier_peak(record), beside_the_allocator(record)) if text),
    )


def _earlier_peak(record: MemoryRecord) -> str:
    """A line for a run whose peak lies in another step than the one that is drawn."""
    drawn = max((sum(values) for values in zip(*record.timeline.components.values(), strict=False)), default=0) if record.timeline else 0
    peak = record.peak_allocated_bytes
    if not drawn or peak is None or gib(peak) == gib(drawn):
        return ""
    return f"the training peak, {gib(peak)}, lies in an earlier step than the last, which is drawn"


def _component_table(record: MemoryRecord) -> Table:
    total = sum(record.peak_components.values())
    used = [c for c in Component if record.peak_components.get(c)]
    rows = [
        (
            Cell(component_name(c), colour=palette.COMPONENTS[c]),
            bytes_cell(record.components.get(c, 0)) if record.components else unknown_cell(),
            bytes_cell(record.peak_components[c]),
            _share(record.peak_components[c], total),
        )
        for c in used
    ]
    if used:
        sums = (bytes_cell(record.allocated_bytes), bytes_cell(total), _share(total, total))
        rows.append((Cell("allocated", style="total"), *sums))
    return Table(f"By component at the training peak{_phase(record)}", ("component", "between steps", "at the peak", "share"), tuple(rows))


def _item_table(record: MemoryRecord) -> Table:
    shown, rest = largest(record.peak_items, PEAK_ITEMS)
    total = sum(item.bytes for item in record.peak_items)
    rows = [
        (
            Cell(inert(item.name), colour=palette.COMPONENTS[item.component]),
            Cell(component_name(item.component)),
            bytes_cell(item.bytes),
            _share(item.bytes, total),
        )
        for item in shown
    ]
    if rest:
        size = sum(item.bytes for item in rest)
        rows.append((Cell(f"{len(rest)} smaller ones"), Cell(""), bytes_cell(size), _share(size, total)))
    return Table(f"Largest tensors at the training peak{_phase(record)}", ("name", "component", "size", "share"), tuple(rows))


def _phase(record: MemoryRecord) -> str:
    return f" ({record.peak_phase})" if record.peak_phase else ""


def _share(size: int, total: int) -> Cell:
    return Cell(share(size, total), size / total if total else 0, "number")
