"""The losses of a script, as it hands them to `engine.backward` or calls `backward` on them: read
without waiting for the device."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from bf16prof.measuring.probes import Probe
from bf16prof.step_records import StepRecord

MOST = 4096
"""Losses that are kept, over all micro-steps."""


class Losses:
    """The mean loss of each step over its micro-steps.

    On a GPU a loss is copied into pinned memory of the host, behind the kernels that make it, and
    read once they are done.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._pinned: Any = None
        self._count = 0
        self._ends: list[int] = []
        self._values: list[float] = []

    def see(self, loss: Any) -> None:
        """A loss that goes backward now."""
        import torch

        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or self._count >= MOST:
            return
        self._count += 1
        if self._probe.device_type != "cuda":
            self._values.append(float(loss.item()))
            return
        with torch.no_grad():
            if self._pinned is None:
                self._pinned = torch.empty(MOST, dtype=torch.float32, device="cpu", pin_memory=True)  # whatever the script's defaults are
            self._pinned[self._count - 1].copy_(loss.detach().reshape(()), non_blocking=True)

    def step_ends(self, *, wait: bool) -> None:
        """A step is over; with `wait` its losses are known from now on."""
        self._ends.append(self._count)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Know all losses so far."""
        if self._pinned is not None:
            self._probe.synchronize()
            self._values = [float(value) for value in self._pinned[: self._count]]

    def of(self, steps: Sequence[StepRecord]) -> tuple[StepRecord, ...]:
        """The steps with their losses, up to the first whose loss is still on its way; all as they
        are if no loss was ever seen."""
        found: list[StepRecord] = []
        for step, begin, end in zip(steps, [0, *self._ends], self._ends, strict=False):
            if end > len(self._values):
                break
            values = self._values[begin:end]
            if not values:
                found.append(step)
                continue
            mean = statistics.fmean(values)
            finite = math.isfinite(mean)
            found.append(dataclasses.replace(step, loss=mean if finite else None, loss_not_finite=not finite))
        return tuple(found)
