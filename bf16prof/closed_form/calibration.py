"""A small model of the time of a step, fitted to measured steps: what a machine makes of the work
that the closed form counts.

A phase (forward, backward, step, and what is between them) takes

    seconds = operations / rate(dtype) + optimizer bytes / bandwidth + sent bytes / bandwidth
              + collectives x latency + launches x overhead

with every constant fitted, none assumed: non-negative least squares over the phases of the measured
cases (Lawson and Hanson 1974, chapter 23), each phase weighted by its step. What the measured cases
cannot tell apart is not fitted: one case gives rates and bandwidths and takes latency and overhead
as part of them; cases of several sizes or stages give all. A case that needs a constant which is
not there has no prediction.

Every second timed step is held back; the error bar is what 90 % of those stay within. It says how a
measured case repeats, not how far the model is off for a case unlike them: extrapolation is not in
it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.errors import InputError
from bf16prof.records import MemoryRecord
from bf16prof.step_records import StepRecord, StepWork
from bf16prof.vocabulary import TRAINING, Device, Phase, Source

Row = dict[str, float]
"""How much of each constant's unit a phase holds."""

BETWEEN = "between phases"
ORDER = ("operations fp32", "operations bf16", "operations fp16", "optimizer bytes", "sent bytes", BETWEEN, "collectives", "launches")
"""The terms; where two cannot be told apart, the first of them is fitted."""

OVERHEAD = ("launches", BETWEEN)
"""What launching costs the host."""

OPTIONAL = ("collectives", *OVERHEAD)
"""Terms without which a case still has a prediction: they are part of the others then."""

EXACT = 1e-3
"""Columns that are closer than this to being combinations of others are combinations of others,
however little steps scatter."""

SWEEPS = 20_000
HELD_BACK = 0.9


@dataclass(frozen=True)
class Calibration:
    """Seconds per unit of each term, where they come from, and the error bar as a share of the step
    time.

    `bias` is the median of (held-back step - fit) / fit.
    """

    run: str
    cases: int
    seconds_per: Mapping[str, float]
    error_share: float
    bias: float
    device: Device
    gpu: str | None
    world_sizes: frozenset[int]
    most_collectives: int

    def predict(self, work: StepWork) -> float | None:
        """Seconds of a step; `None` where a term that it needs was not measured.

        Where the latency of collectives could not be told from their bytes, a step with more of
        them than any that was measured has none.
        """
        if "collectives" not in self.seconds_per and _collectives(work) > self.most_collectives:
            return None
        total = 0.0
        for row in phase_rows(work).values():
            for term, amount in row.items():
                if amount and term not in self.seconds_per and term not in OPTIONAL:
                    return None
                total += amount * self.seconds_per.get(term, 0.0)
        return total

    def host_overhead(self, work: StepWork) -> float | None:
        """Seconds of a step that do not depend on how much there is to do: launches, and what is
        between the phases; `None` where neither could be told from the rest."""
        if not any(term in self.seconds_per for term in OVERHEAD):
            return None
        return sum(row.get(term, 0.0) * self.seconds_per.get(term, 0.0) for row in phase_rows(work).values() for term in OVERHEAD)

    @property
    def constants(self) -> str:
        """The fitted constants: a rate of everything that takes bandwidth, seconds of the
        others."""
        known = {term: value for term, value in self.seconds_per.items() if value}
        return ", ".join(f"{term} {value:.3g} s each" if term in OPTIONAL else f"{term} {1 / value:.3g}/s" for term, value in known.items())

    def applies(self, record: MemoryRecord) -> bool:
        """Whether a record is about the machine that was measured. CPU ranks share its cores, so
        there have to be as many."""
        if record.device is not self.device:
            return False
        return record.gpu == self.gpu if self.device is Device.GPU else record.case.world_size in self.world_sizes

    def calibrated(self, record: MemoryRecord) -> MemoryRecord:
        """The record with the time of its step, or with a note on why there is none."""
        seconds = self.predict(record.work) if record.work and self.applies(record) else None
        if seconds is None or record.work is None:
            return dataclasses.replace(record, notes=(*record.notes, f"step time: nothing measured in {self.run} tells it"))
        cases = "1 measured case" if self.cases == 1 else f"{self.cases} measured cases"
        note = (
            f"step time: calibrated on {cases} of {self.run} ({self.constants}); the error bar is the spread of held-back steps, without "
            "that of extrapolating"
        )
        return dataclasses.replace(
            record,
            step_time_s=seconds,
            step_time_error_s=self.error_share * seconds,
            host_overhead_s=self.host_overhead(record.work),
            tokens_per_s=record.work.tokens * record.case.world_size / seconds,
            notes=(*record.notes, note),
        )


def calibrate(run: str, records: Sequence[MemoryRecord]) -> Calibration:
    """Fit the measured cases among these records. Raises `InputError` where there is none with the
    times of its phases."""
    measured = [r for r in records if r.source is Source.MEASURE and r.work is not None and len(_timed(r)) > 1]
    if not measured:
        raise InputError(
            f"--calibrate {run}: no measured case with the times of its phases",
            hint="bf16prof measure of a model of a family, with --steps 4 or more, makes one",
        )
    machines = {(r.device, r.gpu) for r in measured}
    if len(machines) > 1:
        raise InputError(f"--calibrate {run}: its cases were measured on different devices")
    rows, seconds = _equations(measured)
    fitted = _fit(rows, seconds, max(EXACT, _scatter(measured)))
    device, gpu = next(iter(machines))
    worlds = frozenset(r.case.world_size for r in measured)
    most = max(_collectives(r.work) for r in measured if r.work)
    exact = Calibration(run, len(measured), fitted, 0.0, 0.0, device, gpu, worlds, most)
    errors = sorted(error for record in measured for error in _held_back(exact, record))
    spread = sorted(abs(error) for error in errors)
    return dataclasses.replace(
        exact, error_share=spread[min(len(spread) - 1, int(HELD_BACK * len(spread)))], bias=statistics.median(errors)
    )


def phase_rows(work: StepWork) -> dict[str, Row]:
    """The terms of each phase of a step."""
    operations = f"operations {work.compute_dtype}"
    rows: dict[str, Row] = {
        Phase.FORWARD: {operations: work.forward_flops, "launches": work.micro_steps},
        Phase.BACKWARD: {operations: work.backward_flops + work.recomputed_flops, "launches": 2 * work.micro_steps},
        Phase.STEP: {"optimizer bytes": work.optimizer_bytes},
    }
    for transfer in work.transfers:
        row = rows[transfer.phase]
        row["sent bytes"] = row.get("sent bytes", 0) + transfer.sent_bytes
        row["collectives"] = row.get("collectives", 0) + transfer.calls
    return {**rows, BETWEEN: {BETWEEN: 1}}


def _collectives(work: StepWork) -> int:
    return sum(transfer.calls for transfer in work.transfers)


def _scatter(records: Sequence[MemoryRecord]) -> float:
    """The median relative deviation of steps from their case's median: what a term makes of its own
    has to stand out of it."""
    deviations = []
    for record in records:
        times = [step.time_s or 0.0 for step in _timed(record)]
        middle = statistics.median(times)
        deviations += [abs(time / middle - 1) for time in times]
    return statistics.median(deviations)


def _timed(record: MemoryRecord) -> list[StepRecord]:
    """Steps that are not warm-up and know the time of their phases."""
    return [s for s in record.steps if not s.warmup and s.time_s and all(phase in s.phase_time_s for phase in TRAINING)]


def _equations(records: Sequence[MemoryRecord]) -> tuple[list[Row], list[float]]:
    """One equation per case and phase, the median over every second step, each divided by the
    case's step time."""
    rows, seconds = [], []
    for record in records:
        assert record.work is not None, "measured cases without work were left out"
        steps = _timed(record)[::2]
        whole = statistics.median(s.time_s or 0.0 for s in steps)
        for name, row in phase_rows(record.work).items():
            rows.append({term: amount / whole for term, amount in row.items()})
            seconds.append(statistics.median(_seconds(step, name) for step in steps) / whole)
    return rows, seconds


def _seconds(step: StepRecord, name: str) -> float:
    if name == BETWEEN:
        return max(0.0, (step.time_s or 0.0) - sum(step.phase_time_s[phase] for phase in TRAINING))
    return step.phase_time_s[Phase(name)]


def _held_back(fit: Calibration, record: MemoryRecord) -> list[float]:
    """(held-back step - fit) / fit of each step that was not fitted."""
    predicted = fit.predict(record.work) if record.work else None
    return [(s.time_s or 0.0) / predicted - 1 for s in _timed(record)[1::2]] if predicted else []


def _fit(rows: Sequence[Row], seconds: Sequence[float], told_apart: float) -> dict[str, float]:
    """Non-negative least squares over the terms that the rows tell apart, by cyclic coordinate
    descent on scaled columns."""
    columns = {term: [row.get(term, 0.0) for row in rows] for term in ORDER}
    chosen = _independent(columns, told_apart)
    scales = {term: _dot(columns[term], columns[term]) ** 0.5 for term in chosen}
    units = {term: [value / scales[term] for value in columns[term]] for term in chosen}
    solution = dict.fromkeys(chosen, 0.0)
    rest = list(seconds)
    for _ in range(SWEEPS):
        moved = 0.0
        for term, column in units.items():
            change = max(-solution[term], _dot(column, rest))
            solution[term] += change
            rest = [r - change * c for r, c in zip(rest, column, strict=True)]
            moved = max(moved, abs(change))
        if moved < 1e-12:
            break
    return {term: value / scales[term] for term, value in solution.items()}


def _independent(columns: Mapping[str, Sequence[float]], told_apart: float) -> list[str]:
    """The terms of whose columns at least a share is no combination of those before them:
    Gram-Schmidt in the order of `ORDER`."""
    chosen: list[str] = []
    basis: list[list[float]] = []
    for term, column in columns.items():
        size = _dot(column, column)
        rest = list(column)
        for direction in basis:
            share = _dot(rest, direction)
            rest = [r - share * d for r, d in zip(rest, direction, strict=True)]
        left = _dot(rest, rest)
        if size and (left / size) ** 0.5 > told_apart:
            chosen.append(term)
            basis.append([r / left**0.5 for r in rest])
    return chosen


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
