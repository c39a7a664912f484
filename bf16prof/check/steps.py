"""Whole training steps of a Hugging Face model in plain PyTorch, without DeepSpeed: forward,
backward, AdamW over lists of parameters.

The loop is that of the fine-tuning runs that `vramcalc` publishes: gradients stay allocated
(`zero_grad(set_to_none=False)`), and the logits are dropped before the step. `python -m
bf16prof.check.steps < steps.json` runs them on a simulated GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bf16prof.profiles.load import Override, load_profile

STEPS = 2
"""The first makes gradients and states; the others are alike."""


@dataclass(frozen=True)
class PublishedStep:
    """A model by the name of its preset, and how it is trained."""

    model: str
    tokens: int
    autocast: bool = False
    checkpointing: bool = False
    attention: str | None = None


def step_of(step: PublishedStep, device: torch.device) -> Callable[[], None]:
    """One training step, to be called some times."""
    model = _model(step).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(1, step.tokens, dtype=torch.int64, device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=step.autocast):
            outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()
        del outputs
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return run


def _model(step: PublishedStep) -> nn.Module:
    from bf16prof.models.modules import build

    attention = [Override("model.attn_implementation", step.attention, "the step")] if step.attention else []
    settings: Any = load_profile(step.model, attention).profile.model
    model: nn.Module = build(settings, activation_checkpointing=step.checkpointing)
    model.train()
    return model if step.autocast else model.to(torch.bfloat16)


def simulated(gpu: str, steps: Sequence[PublishedStep]) -> list[int]:
    """The peaks of these steps on a simulated GPU in bytes. One such call per process."""
    import gc
    import warnings

    from bf16prof.check.kernels import PeakCounter, peak_bytes
    from bf16prof.dry_run.shims import library_shims
    from bf16prof.dry_run.tracker import GPU
    from bf16prof.dry_run.world import world
    from bf16prof.profiles.gpus import find_gpu

    warnings.simplefilter("ignore")
    peaks = []
    with world(1, find_gpu(gpu)) as tracker:
        memory = PeakCounter(tracker.ledger.take_phase_peak, tracker.ledger.take_phase_peak)
        for step in steps:
            run = step_of(step, GPU)
            with library_shims():
                peaks.append(peak_bytes(run, memory, STEPS))
            del run
            gc.collect()
    return peaks


def main() -> None:
    """Steps of one GPU in, peaks out, as JSON."""
    asked = json.load(sys.stdin)
    peaks = simulated(asked["gpu"], [PublishedStep(**step) for step in asked["steps"]])
    sys.stdout.write("\n" + json.dumps(peaks) + "\n")


if __name__ == "__main__":
    main()
