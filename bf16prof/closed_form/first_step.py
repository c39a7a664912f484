"""What is not there yet in the first optimizer step, and the peaks that are higher in it all the
same.

References are to DeepSpeed 0.19.8, `deepspeed/runtime/`.
"""

from __future__ import annotations

from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.passes import Meter, Peak
from bf16prof.closed_form.wrappers import model_states
from bf16prof.engine.labels import GLOBAL_NORM, PERSISTENT_PARAMETERS
from bf16prof.vocabulary import Component, Phase

LAZY = {Component.MOMENTUM, Component.VARIANCE}
"""Made by the optimizer in its first step."""
LATE = {GLOBAL_NORM, PERSISTENT_PARAMETERS}
"""There from the end of the first step on."""


def raise_to_first_step(engine: Engine, meter: Meter, first: Meter) -> None:
    """Raise the peaks of forward and backward at stage 3 to those of the `first` micro-steps of a
    job, where these are higher."""
    missing = Meter(meter.block)
    for each in model_states(engine):
        if not each.on_host and (each.label[0] in LAZY or each.label in LATE):
            missing.give(each.label, *each.sizes)
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        peak, level = first.peaks[phase], first.peaks[phase].level + missing.level
        if level > meter.peaks[phase].level:
            held = {label: peak.held.get(label, 0) + missing.held.get(label, 0) for label in peak.held | missing.held}
            meter.peaks[phase] = Peak(level, peak.section, peak.events, held)
