"""Runs as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: memory by component as
counters, phases as slices.

The format is Chrome's Trace Event Format (JSON). A dry run has no clock: of its timeline an event
(an allocation or a free) is a microsecond long, and the process's name says so. Measured steps have
the seconds that they took.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from bf16prof.records import MemoryRecord, Timeline
from bf16prof.reports.units import inert
from bf16prof.reports.views import CaseView, component_name, run_views
from bf16prof.runs import Run
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import TRAINING

NAME = "trace.json"
"""A file that is called so, or ends in `.trace.json`, is a trace; any other `.json` is the
document."""

_Event = dict[str, Any]
_MICROSECONDS = 1e6
_STEPS, _PHASES = 1, 2
"""Rows of a process: steps, and the phases in them."""


def is_trace(name: str) -> bool:
    """Whether a file of that name is to be a trace."""
    return name == NAME or name.endswith(f".{NAME}")


def trace(runs: Sequence[Run]) -> str:
    """The trace of all records that know the inside of a step, or the times of steps, as JSON."""
    known = [(view, record) for view in run_views(runs) for record in view.records.values() if record.timeline or _timed(record)]
    events = [event for pid, (view, record) in enumerate(known, 1) for event in _process(pid, view, record)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _timed(record: MemoryRecord) -> list[StepRecord]:
    return [step for step in record.steps if step.time_s is not None]


def _process(pid: int, view: CaseView, record: MemoryRecord) -> Iterator[_Event]:
    clock = "one allocation or free a microsecond" if record.timeline else "seconds of the wall clock"
    name = f"{inert(view.label)}, {record.source} ({clock})"
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": _PHASES, "name": "thread_name", "args": {"name": "phases"}}
    if record.timeline:
        yield from _inside(pid, record.timeline)
    else:
        yield {"ph": "M", "pid": pid, "tid": _STEPS, "name": "thread_name", "args": {"name": "steps"}}
        yield from _steps(pid, _timed(record))


def _inside(pid: int, timeline: Timeline) -> Iterator[_Event]:
    """Phases as slices, and after each event the bytes of each component and of all."""
    end = timeline.events[-1] if timeline.events else 0
    ends = [*(start.event for start in timeline.phases[1:]), end]
    for start, until in zip(timeline.phases, ends, strict=False):
        yield _slice(pid, _PHASES, str(start.phase), start.event, max(0, until - start.event))
    components = {component_name(c): sizes for c, sizes in timeline.components.items() if any(sizes)}
    for index, event in enumerate(timeline.events):
        yield _counter(pid, "allocated by component", event, {name: sizes[index] for name, sizes in components.items()})
        yield _counter(pid, "allocated", event, {"bytes": sum(sizes[index] for sizes in components.values())})


def _steps(pid: int, steps: Sequence[StepRecord]) -> Iterator[_Event]:
    """Steps and their phases as slices one after the other, the peak of each phase while it lasts,
    and what is left at the end."""
    now = 0.0
    for step in steps:
        took = (step.time_s or 0.0) * _MICROSECONDS
        yield _slice(pid, _STEPS, f"step {step.step}" + (" (warm-up)" if step.warmup else ""), now, took)
        begun = now
        for phase in TRAINING:
            seconds = step.phase_time_s.get(phase)
            memory = step.phases.get(phase)
            if memory is not None and memory.peak_bytes is not None:
                yield _counter(pid, "peak of the phase", begun, {"bytes": memory.peak_bytes})
            if seconds is not None:
                yield _slice(pid, _PHASES, str(phase), begun, seconds * _MICROSECONDS)
                begun += seconds * _MICROSECONDS
        now += took
        if step.allocated_bytes is not None:
            yield _counter(pid, "allocated at the end of a step", now, {"bytes": step.allocated_bytes})
        if step.loss is not None:
            yield _counter(pid, "loss", now, {"loss": step.loss})


def _slice(pid: int, row: int, name: str, start: float, duration: float) -> _Event:
    return {"ph": "X", "pid": pid, "tid": row, "name": name, "ts": start, "dur": duration}


def _counter(pid: int, name: str, at: float, values: dict[str, int | float]) -> _Event:
    return {"ph": "C", "pid": pid, "name": name, "ts": at, "args": values}
