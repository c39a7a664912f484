"""From findings to the record of an imported run: each quantity from whoever said it most exactly; the notes say what that leaves open."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from bf16prof.imports.finding import Finding, Reading
from bf16prof.records import Case, Device, MemoryRecord, Phase, PhaseMemory, Source, StepRecord, peak_phase
from bf16prof.summaries import interquartile_range

GROWING = ("allocated_bytes", "peak_allocated_bytes", "run_peak_allocated_bytes", "reserved_bytes")
"""Quantities of one run, none of which is larger than the next."""


def imported_record(case: Case, findings: Sequence[Finding], *, gpu: str | None = None, notes: Sequence[str] = ()) -> MemoryRecord:
    """The record of a run on GPUs.

    `rounding` holds what a log's rounding leaves open of a quantity. `gpu` is what the user said; a log that names it wins.
    """
    said: dict[str, tuple[Reading, Finding]] = {}
    contradictions = []
    for finding in findings:
        for name, reading in finding.readings.items():
            best, other = said.get(name, (reading, finding))
            if max(best.low, reading.low) > min(best.high, reading.high):
                contradictions.append(f"{name}: {best.bytes} by {other.format}, {reading.bytes} by {finding.format}")
            if name not in said or reading.rounding < best.rounding:
                said[name] = (reading, finding)
    readings = {name: reading for name, (reading, _) in said.items()}
    contradictions += [
        f"{large} is {readings[large].bytes}, and {small} {readings[small].bytes}"
        for small, large in itertools.combinations([name for name in GROWING if name in readings], 2)
        if readings[small].low > readings[large].high
    ]
    steps = joined_steps([finding.steps for finding in findings])
    fields: dict[str, Any] = {"parameters": None, "gpu": gpu, **_times(steps)}
    for finding in reversed(findings):
        fields |= finding.facts
    fields |= {name: reading.bytes for name, reading in readings.items() if "." not in name}
    phases = _phases(readings)
    return MemoryRecord(
        source=Source.IMPORT,
        case=case,
        device=Device.GPU,
        **fields,
        phases=phases,
        peak_phase=peak_phase(phases),
        items=next((f.items for f in findings if f.items), ()),
        loss=next((step.loss for step in reversed(steps) if step.loss is not None or step.loss_not_finite), None),
        steps=steps,
        rounding={name: reading.rounding for name, reading in readings.items() if reading.rounding},
        notes=(*notes, *(n for f in findings for n in f.notes), *_contradicting(contradictions), *rounding_note(readings)),
    )


def rounding_note(readings: dict[str, Reading]) -> list[str]:
    """How exact the quantities are that were printed rounded, in one line."""
    by_width: dict[int, list[str]] = {}
    for name, reading in readings.items():
        if reading.rounding:
            by_width.setdefault(reading.rounding, []).append(name)
    if not by_width:
        return []
    widths = "; ".join(f"± {width:,} bytes: {', '.join(names)}" for width, names in by_width.items())
    return [f"printed rounded, and a prediction within that agrees: {widths}"]


def joined_steps(lists: Sequence[Sequence[StepRecord]]) -> tuple[StepRecord, ...]:
    """Steps that several formats know: loss and time each from the first that says it; no loss where one says that it was not finite."""
    joined: dict[int, StepRecord] = {}
    for steps in lists:
        for step in steps:
            known = joined.get(step.step, step)
            lost = known.loss_not_finite or step.loss_not_finite
            loss = None if lost else step.loss if known.loss is None else known.loss
            time = step.time_s if known.time_s is None else known.time_s
            joined[step.step] = StepRecord(step.step, loss, time, None, loss_not_finite=lost)
    return tuple(joined[number] for number in sorted(joined))


def _phases(readings: dict[str, Reading]) -> dict[Phase, PhaseMemory]:
    phases = {}
    for phase in Phase:
        peak, end = (readings.get(f"phases.{phase}.{instant}_bytes") for instant in ("peak", "end"))
        if peak or end:
            phases[phase] = PhaseMemory(peak.bytes if peak else None, end.bytes if end else None)
    return phases


def _times(steps: Sequence[StepRecord]) -> dict[str, float | None]:
    """The median over all logged steps and its spread; a mean that a log prints itself takes its place."""
    times = [step.time_s for step in steps if step.time_s is not None]
    return {"step_time_s": statistics.median(times), "step_time_iqr_s": interquartile_range(times)} if times else {}


def _contradicting(found: Sequence[str]) -> list[str]:
    return [f"what was read contradicts itself; of one quantity the more exact number is used: {'; '.join(found)}"] if found else []
