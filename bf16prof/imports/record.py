"""From findings to the record of an imported run: each quantity from whoever said it most exactly;
the notes say what that leaves open."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.imports.finding import Finding, Reading
from bf16prof.imports.merge import merged
from bf16prof.records import Case, MemoryRecord, peak_phase
from bf16prof.step_records import PhaseMemory, StepRecord
from bf16prof.summaries import interquartile_range
from bf16prof.vocabulary import Device, Phase, Source


@dataclass(frozen=True)
class Batch:
    """What a step is made of, as far as somebody says it: sequences of the whole job, and
    micro-steps. Rates become times by them."""

    train_batch_size: int | None = None
    accumulation: int | None = None


def imported_record(
    case: Case, findings: Sequence[Finding], *, gpu: str | None = None, notes: Sequence[str] = (), batch: Batch | None = None
) -> MemoryRecord:
    """The record of a run on GPUs.

    `rounding` holds what a log's rounding leaves open of a quantity, `at_least` names those that
    are lower bounds. `gpu` is what the user said; a log that names it wins. `batch`: as the user
    describes it; if not given, as the log does.
    """
    readings, contradictions = merged(findings)
    batch = batch or said_batch(findings)
    steps = joined_steps([*(finding.steps for finding in findings), *(_rated(finding, batch) for finding in findings)])
    fields: dict[str, Any] = {"parameters": None, "gpu": gpu, **_times(steps, findings)}
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
        peak_phase=_peak_phase(phases, readings),
        items=next((f.items for f in findings if f.items), ()),
        out_of_memory=next((f.shortage for f in findings if f.shortage), None),
        loss=next((step.loss for step in reversed(steps) if step.loss is not None or step.loss_not_finite), None),
        steps=steps,
        rounding={name: reading.rounding for name, reading in readings.items() if reading.rounding},
        at_least=tuple(name for name, reading in readings.items() if reading.is_floor),
        notes=(*notes, *(n for f in findings for n in f.notes), *_contradicting(contradictions), *rounding_note(readings)),
    )


def said_batch(findings: Sequence[Finding]) -> Batch:
    """The batch as the log itself says it."""
    said = {name: value for finding in reversed(findings) for name, value in finding.said.items()}
    return Batch(said.get("train_batch_size"), said.get("gradient_accumulation_steps"))


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
    """Steps that several formats know: loss and time each from the first that says it; no loss
    where one says that it was not finite."""
    joined: dict[int, StepRecord] = {}
    for steps in lists:
        for step in steps:
            known = joined.get(step.step, step)
            lost = known.loss_not_finite or step.loss_not_finite
            loss = None if lost else step.loss if known.loss is None else known.loss
            time = step.time_s if known.time_s is None else known.time_s
            joined[step.step] = StepRecord(step.step, loss, time, None, loss_not_finite=lost)
    return tuple(joined[number] for number in sorted(joined))


def _rated(finding: Finding, batch: Batch) -> tuple[StepRecord, ...]:
    """Steps from rates: samples per second need the batch, micro-steps their number in a step."""
    rates, size, accumulation = finding.rates, batch.train_batch_size, batch.accumulation
    if size and rates.samples_per_s:
        times = [(step, size / rate) for step, rate in sorted(rates.samples_per_s.items())]
        return tuple(StepRecord(step, None, time, None) for step, time in times if math.isfinite(time))
    if accumulation and rates.micro_step_s:
        whole = len(rates.micro_step_s) // accumulation
        parts = [rates.micro_step_s[n * accumulation : (n + 1) * accumulation] for n in range(whole)]
        return tuple(StepRecord(n, None, math.fsum(part), None) for n, part in enumerate(parts))
    return ()


def _phases(readings: Mapping[str, Reading]) -> dict[Phase, PhaseMemory]:
    phases = {}
    for phase in Phase:
        peak, end = (readings.get(f"phases.{phase}.{instant}_bytes") for instant in ("peak", "end"))
        if peak or end:
            phases[phase] = PhaseMemory(peak.bytes if peak else None, end.bytes if end else None)
    return phases


def _peak_phase(phases: dict[Phase, PhaseMemory], readings: Mapping[str, Reading]) -> Phase | None:
    """The phase of the training peak; not known while any of the peaks is open above."""
    found = peak_phase(phases)
    is_open = any(
        readings[name].is_floor for phase in Phase if (name := f"phases.{phase}.peak_bytes") in readings and phase is not Phase.INIT
    )
    return None if is_open else found


def _times(steps: Sequence[StepRecord], findings: Sequence[Finding]) -> dict[str, float | None]:
    """The median over all logged steps and its spread; a mean that a log prints itself takes its
    place where it is of steps alone."""
    times = [step.time_s for step in steps if step.time_s is not None]
    if times:
        return {"step_time_s": statistics.median(times), "step_time_iqr_s": interquartile_range(times)}
    return {"step_time_s": next((f.rates.mean_step_s for f in findings if f.rates.mean_step_s), None)}


def _contradicting(found: Sequence[str]) -> list[str]:
    return [f"what was read contradicts itself; of one quantity the more exact number is used: {'; '.join(found)}"] if found else []
