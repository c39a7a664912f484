"""What the reports show, before it is drawn: the records of one case side by side, line by line,
and the headline over all cases.

Console and HTML read these same views, so that they can never say different things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bf16prof.reconcile import REFERENCES, Comparison, reconcile
from bf16prof.records import Case, Item, MemoryRecord, Workload
from bf16prof.reports.units import AT_LEAST, NOT_FINITE, gib, inert, number, seconds
from bf16prof.runs import Run
from bf16prof.vocabulary import Component, Device, Phase, Source

MEMORY_TOTALS = {
    "allocated_bytes": "allocated",
    "peak_allocated_bytes": "training peak",
    "run_peak_allocated_bytes": "whole-run peak",
    "reserved_bytes": "reserved",
    "reserved_floor_bytes": "reserved, at least",
    "fragmentation_bytes": "fragmentation",
    "device_bytes": "on the device",
    "host_bytes": "host, a rank",
    "host_bytes_per_node": "host, a node",
}
"""How the quantities of a record are called in tables."""

PEAK_ITEMS = 12
"""So many of the tensors that are alive at the peak are shown by name."""

PEAKS = ("peak_allocated_bytes", "run_peak_allocated_bytes")

_ORDER = (Source.MEASURE, Source.IMPORT, Source.ESTIMATE, Source.SIMULATE)


@dataclass(frozen=True)
class Line:
    """One quantity of a case by source. `differences` (prediction - reference) and `errors` exist
    only where both are known.

    `at_least`: the reference is a lower bound; `consistent` are the predictions that are not below
    it, which have no difference.
    """

    quantity: str
    label: str
    kind: str
    values: dict[Source, int | float]
    differences: dict[Source, int | float]
    errors: dict[Source, float | None]
    rounding: int = 0
    at_least: bool = False
    consistent: frozenset[Source] = frozenset()

    def as_printed(self, source: Source) -> bool:
        """Whether a prediction is not exact, and differs by no more than the rounding of the
        reference explains."""
        return 0 < abs(self.differences.get(source, 0)) <= self.rounding


@dataclass(frozen=True)
class CaseView:
    """All records of one case, by source. `label` is unique among the views that were built
    together, and inert.

    `profile` is what the run of the record to show says that it trained, as plain data.
    """

    case: Case
    device: Device
    label: str
    run: str
    records: dict[Source, MemoryRecord]
    comparisons: tuple[Comparison, ...]
    profile: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> MemoryRecord | None:
        """The measured (or imported) record."""
        return next((self.records[s] for s in REFERENCES if s in self.records), None)

    @property
    def predictions(self) -> list[MemoryRecord]:
        """The records that are not the reference, the estimate first."""
        return [r for r in self.records.values() if r is not self.reference]

    @property
    def main(self) -> MemoryRecord:
        """The record to show when there is room for one: the reference, else the dry run, which
        knows the peaks, else the estimate."""
        return self.reference or self.records.get(Source.SIMULATE) or next(iter(self.records.values()))

    @property
    def whole_run_only(self) -> Line | None:
        """The peak of the whole run, where the record to show knows no other: a log seldom tells
        training from init."""
        if self.main.peak_allocated_bytes is not None or self.main.run_peak_allocated_bytes is None:
            return None
        return self.line("run_peak_allocated_bytes")

    def line(self, quantity: str) -> Line | None:
        """One quantity side by side, or None when no source knows it."""
        found = next((c for c in self.comparisons if c.quantity == quantity), None)
        return _line(found) if found else None

    def lines(self) -> list[Line]:
        """Every quantity that some source knows: the components, then the totals, then the peaks of
        each phase, then the time."""
        order = {"component": 0, "total": 1, "phase": 2, "time": 3}
        return sorted((_line(c) for c in self.comparisons), key=lambda line: order[line.kind])


@dataclass(frozen=True)
class Headline:
    """How good the predictions are, over all cases: how many are exact to the byte, or as far as
    the reference was printed, and the largest error of memory.
    """

    cases: int
    measured: int
    compared: int
    exact: int
    as_printed: int
    worst: tuple[CaseView, Line, Source] | None
    worst_peak: tuple[CaseView, Line, Source] | None


def run_views(runs: Sequence[Run]) -> list[CaseView]:
    """One view per case and device of several runs, reconciled, in the order in which they first
    appear.

    Runs complete each other's cases; a case that two runs have from the same source is kept apart
    by run.
    """
    owned = [(index, record) for index, run in enumerate(runs) for record in run.records]
    return _views(owned, runs)


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name per run: where several are called the same, that of its folder; where these are the
    same as well, with a number."""
    named = [inert(run.manifest.name) for run in runs]
    folders = [inert(run.path.resolve().name) for run in runs]
    names = [name if named.count(name) == 1 else folder or name for name, folder in zip(named, folders, strict=True)]
    return [name if names.count(name) == 1 else f"{named[index]} #{index + 1}" for index, name in enumerate(names)]


def headline(views: Sequence[CaseView]) -> Headline:
    """The summary of all comparisons of allocated and peak memory with a measurement."""
    steady = [row for view in views if (line := view.line("allocated_bytes")) for row in _rows(view, line)]
    peaks = [row for view in views for name in PEAKS if (line := view.line(name)) for row in _rows(view, line)]
    exact = sum(row[1].differences[row[2]] == 0 for row in steady)
    printed = sum(line.as_printed(source) for _, line, source in steady)
    measured = sum(view.reference is not None for view in views)
    return Headline(len(views), measured, len(steady), exact, printed, _worst(steady), _worst(peaks))


def losses(record: MemoryRecord) -> list[tuple[int, float | None]]:
    """(step, loss) of the steps whose loss the source said; `None` where it was not a finite
    number.

    A step without a loss says nothing of it (a log that prints every tenth), but for a measured
    one, which has read it if it has any.
    """
    said = [s for s in record.steps if s.loss is not None or s.loss_not_finite]
    said = list(record.steps) if said and record.source is Source.MEASURE else said
    return [(s.step, s.loss if s.loss is not None and math.isfinite(s.loss) else None) for s in said]


def loss_text(record: MemoryRecord, arrow: str = "->") -> str:
    """The first and the last loss: "10.83 -> 7.912", "5.516 -> not finite (4 of 5 steps)"; the last
    alone where no step is kept."""
    curve = losses(record)
    if not curve:
        return number(record.loss)
    (_, first), (_, last) = curve[0], curve[-1]
    lost = sum(loss is None for _, loss in curve)
    ends = NOT_FINITE if lost == len(curve) else f"{_loss(first)} {arrow} {_loss(last)}"
    of_steps = f"{lost} of {len(curve)} steps"
    return ends + ("" if not lost else f" ({of_steps})" if last is None else f" ({NOT_FINITE} in {of_steps})")


def _loss(loss: float | None) -> str:
    return NOT_FINITE if loss is None else number(loss)


def step_times(record: MemoryRecord) -> list[tuple[int, float, bool]]:
    """(step, seconds, warm-up) of the steps whose time is known."""
    return [(s.step, s.time_s, s.warmup) for s in record.steps if s.time_s is not None and math.isfinite(s.time_s)]


def provenance(record: MemoryRecord) -> str:
    """Whether a number was measured: "measured", "imported" or "predicted (estimate)"."""
    return {Source.MEASURE: "measured", Source.IMPORT: "imported"}.get(record.source, f"predicted ({record.source})")


def references(views: Sequence[CaseView]) -> str:
    """What the numbers are that predictions are held against: "measured", "imported" or both; empty
    where there are none."""
    kinds = {view.reference.source: provenance(view.reference) for view in views if view.reference}
    return " or ".join(kinds[source] for source in REFERENCES if source in kinds)


def largest(items: Sequence[Item], most: int) -> tuple[list[Item], list[Item]]:
    """The largest items, biggest first, and the rest, which is never a single one."""
    ordered = sorted(items, key=lambda item: -item.bytes)
    cut = len(ordered) if len(ordered) == most + 1 else most
    return ordered[:cut], ordered[cut:]


def _rows(view: CaseView, line: Line) -> list[tuple[CaseView, Line, Source]]:
    return [(view, line, source) for source in line.differences]


def _worst(rows: list[tuple[CaseView, Line, Source]]) -> tuple[CaseView, Line, Source] | None:
    known = [(view, line, source) for view, line, source in rows if line.errors.get(source) is not None and not line.as_printed(source)]
    return max(known, key=lambda row: abs(row[1].errors[row[2]] or 0.0), default=None)


def _views(owned: list[tuple[int, MemoryRecord]], runs: Sequence[Run]) -> list[CaseView]:
    names = run_names(runs)
    owners = {id(record): index for index, record in owned}
    groups: dict[tuple[Case, Device], list[tuple[int, MemoryRecord]]] = {}
    for index, record in owned:
        groups.setdefault((record.case, record.device), []).append((index, record))
    parts = [(key, part) for key, members in groups.items() for part in _parts(members)]
    labels = _labels(parts, names)
    views = []
    for (key, (run, records)), label in zip(parts, labels, strict=True):
        by_source = {record.source: record for record in records}
        ordered = {source: by_source[source] for source in _ORDER if source in by_source}
        view = CaseView(*key, label, "" if run is None else names[run], ordered, tuple(reconcile(records)))
        views.append(replace(view, profile=runs[owners[id(view.main)]].manifest.profile))
    return views


def _parts(members: list[tuple[int, MemoryRecord]]) -> list[tuple[int | None, list[MemoryRecord]]]:
    """The members of one case: together (run None), or by run when two runs have the same
    source."""
    owners = {(record.source, index) for index, record in members}
    if len({source for source, _ in owners}) == len(owners):
        return [(None, [record for _, record in members])]
    return [(run, [record for index, record in members if index == run]) for run in dict.fromkeys(index for index, _ in members)]


def _labels(parts: Sequence[tuple[tuple[Case, Device], tuple[int | None, list[MemoryRecord]]]], names: list[str]) -> list[str]:
    """The label of each case, with its profile, device and run only where these differ."""
    many_profiles = len({case.profile for (case, _), _ in parts}) > 1
    many_devices = len({device for (_, device), _ in parts}) > 1
    labels = []
    for (case, device), (run, _) in parts:
        label = case_label(case)
        if many_profiles:
            label = f"{inert(case.profile)}: {label}"
        if many_devices:
            label += f" ({device})"
        if run is not None:
            label += f" [{names[run]}]"
        labels.append(label)
    return _told_apart(labels, [records[0].workload for _, (_, records) in parts], [case.workload for (case, _), _ in parts])


def _told_apart(labels: list[str], workloads: Sequence[Workload | None], digests: Sequence[str]) -> list[str]:
    """The labels, where several are the same each with its workload: "4,096 x 1 x 1", else with the
    digest of its settings."""
    sizes = [f"{label} ({workload_sizes(workload)})" if workload else label for label, workload in zip(labels, workloads, strict=True)]
    better = [size if labels.count(label) > 1 else label for label, size in zip(labels, sizes, strict=True)]
    return [
        label if better.count(label) == 1 or not digest else f"{label} ({digest})" for label, digest in zip(better, digests, strict=True)
    ]


def workload_sizes(workload: Workload) -> str:
    """Tokens x micro-batch x accumulation, and whether activations are recomputed: "4,096 x 2 x 1,
    checkpointing"."""
    sizes = (workload.sequence_length, workload.micro_batch_size, workload.gradient_accumulation_steps)
    return " x ".join(f"{size:,}" for size in sizes if size is not None) + ", checkpointing" * workload.activation_checkpointing


def case_label(case: Case) -> str:
    """The label of a case with its recipe's name made inert."""
    return replace(case, recipe=inert(case.recipe)).label


def _line(comparison: Comparison) -> Line:
    label, kind = _name(comparison.quantity)
    truth = next((comparison.values[s] for s in REFERENCES if s in comparison.values), None)
    values = {s: comparison.values[s] for s in _ORDER if s in comparison.values}
    predictions = [s for s in values if s not in REFERENCES]
    consistent = frozenset(s for s in predictions if comparison.is_consistent(s))
    differences = {} if truth is None else {s: values[s] - truth for s in predictions if s not in consistent}
    errors = {s: comparison.errors.get(s) for s in differences}
    return Line(comparison.quantity, label, kind, values, differences, errors, comparison.rounding, comparison.at_least, consistent)


def bound(record: MemoryRecord, quantity: str) -> str:
    """What stands before a quantity of a record: ">= " where it is a lower bound, else nothing."""
    return AT_LEAST if quantity in record.at_least else ""


def total_text(record: MemoryRecord, quantity: str) -> str:
    """A total of a record for a person: "25.74 GiB", ">= 3.14 GiB"."""
    return bound(record, quantity) + gib(getattr(record, quantity))


def value_text(line: Line, source: Source) -> str:
    """A value of a line for a person, with what stands before a lower bound."""
    value = line.values.get(source)
    mark = AT_LEAST if line.at_least and source in REFERENCES else ""
    return seconds(value) if line.kind == "time" else mark + gib(value)


def quantity_name(quantity: str) -> str:
    """What one of the reconciler's quantities is called in tables."""
    return _name(quantity)[0]


def _name(quantity: str) -> tuple[str, str]:
    """The label and the kind of one of the reconciler's quantities."""
    if quantity in MEMORY_TOTALS:
        return MEMORY_TOTALS[quantity], "total"
    head, _, tail = quantity.partition(".")
    if head == "components":
        return component_name(Component(tail)), "component"
    if head == "phases":
        phase, _, instant = tail.partition(".")
        return f"{Phase(phase)} {'peak' if instant == 'peak_bytes' else 'end'}", "phase"
    return "step time", "time"


def component_name(component: Component) -> str:
    """A component's name for a person: "master parameters"."""
    return component.value.replace("_", " ")
