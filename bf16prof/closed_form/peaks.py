"""The peaks of all phases of a job, and what is alive at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.closed_form.between_steps import model_buffers
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.initial import after_init
from bf16prof.closed_form.passes import Meter, activations
from bf16prof.closed_form.program import Program
from bf16prof.closed_form.sources import source_of
from bf16prof.closed_form.training import passes
from bf16prof.closed_form.walks import Walked
from bf16prof.engine.labels import MODEL_BUFFERS
from bf16prof.records import Item
from bf16prof.rounding import round_up
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import ROUNDED, Component, Device, Label, Phase


@dataclass(frozen=True)
class Peaks:
    """The phases, and from what their peaks follow."""

    phases: Mapping[Phase, PhaseMemory]
    steady: Sequence[Item]
    meter: Meter
    program: Program

    def items(self, phase: Phase) -> tuple[Item, ...]:
        """What is alive at the peak of a training phase, biggest first; what the allocator's
        rounding adds comes last in the sum."""
        peak = self.meter.peaks[phase]
        sizes: dict[Label, int] = {}
        for item in self.steady:
            _add(sizes, (item.component, item.name), item.bytes)
        for part in (peak.held, activations(self.program, peak.section, peak.events) if phase is not Phase.STEP else {}):
            for label, size in part.items():
                _add(sizes, label, size)
        sizes = {label: size for label, size in sizes.items() if label[0] is not Component.ROUNDING and size}
        total = self.phases[phase].peak_bytes or 0
        if rest := total - sum(sizes.values()):
            sizes[ROUNDED] = rest
        known = {(item.component, item.name): item.source for item in self.steady}
        ordered = sorted(sizes.items(), key=lambda pair: -pair[1])
        return tuple(Item(*label, size, known.get(label) or source_of(label)) for label, size in ordered)


def _add(sizes: dict[Label, int], label: Label, size: int) -> None:
    sizes[label] = sizes.get(label, 0) + size


def peaks(job: Job, engine: Engine, done: Walked, steady: Sequence[Item]) -> Peaks:
    """The peaks of a job that holds these items between two steps, from the walk through one."""
    base = sum(item.bytes for item in steady)
    meter = passes(engine, done)
    phases = {Phase.INIT: init_memory(job, engine)}
    for phase, peak in meter.peaks.items():
        phases[phase] = PhaseMemory(base + peak.level, base + meter.ends[phase])
    return Peaks(phases, steady, meter, done.program)


def init_memory(job: Job, engine: Engine) -> PhaseMemory:
    """Init, with the model's buffers, which are there all the time; a CPU rank also builds the
    model in its only memory, in fp32."""
    start = after_init(job, engine, zero_init=job.is_inside_zero_init)
    buffers = sum(round_up(size, start.block) for each in model_buffers(job, engine) for size in each.sizes if each.label == MODEL_BUFFERS)
    peak, end = start.peaks[Phase.INIT].level + buffers, start.ends[Phase.INIT] + buffers
    signature = engine.anatomy.signature
    if signature is not None and job.device is Device.CPU and not job.is_inside_zero_init:
        peak = max(peak, signature.building[0])
    return PhaseMemory(peak, end)
