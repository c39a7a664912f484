"""The losses of a script, as it hands them to `engine.backward` or calls `backward` on them: read without waiting for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from bf16prof.measuring.probes import Probe
from bf16prof.records import StepRecord
from bf16prof.scripts.watch import Watch, in_backward, is_pipeline

MOST = 4096
"""Losses that are kept, over all micro-steps."""


class Losses:
    """The mean loss of each step over its micro-steps.

    On a GPU a loss is copied into pinned memory of the host, behind the kernels that make it, and read once they are done.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._pinned: Any = None
        self._count = 0
        self._is_over = False
        self._ends: list[int] = []
        self._values: list[float] = []

    def listen(self, engine: Any) -> None:
        """Hear of the losses of this engine from now on, after whoever watches its phases."""
        if is_pipeline(engine):
            return
        backward = engine.backward

        @functools.wraps(backward)
        def call(loss: Any, *args: Any, **kwargs: Any) -> Any:
            self.see(loss)
            return backward(loss, *args, **kwargs)

        engine.backward = call

    def see(self, loss: Any) -> None:
        """A loss that goes backward now."""
        import torch

        if self._is_over or not isinstance(loss, torch.Tensor) or loss.numel() != 1 or self._count >= MOST or in_backward():
            return
        self._count += 1
        if self._probe.device_type != "cuda":
            self._values.append(float(loss.detach()))
            return
        with torch.no_grad():
            if self._pinned is None:
                self._pinned = torch.empty(MOST, dtype=torch.float32, device="cpu", pin_memory=True)  # whatever the script's defaults are
            self._pinned[self._count - 1].copy_(loss.detach().reshape(()), non_blocking=True)

    @contextlib.contextmanager
    def heard(self, watch: Watch) -> Iterator[None]:
        """Hear also of losses on which a script calls `backward` itself, without an engine."""
        import torch

        real = torch.autograd.backward

        @functools.wraps(real)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if watch.engines and not watch.is_inside:
                self.see(tensors)
            return real(tensors, *args, **kwargs)

        with mock.patch.object(torch.autograd, "backward", backward):
            yield

    def step_ends(self, *, wait: bool) -> None:
        """A step is over; with `wait` its losses are known from now on."""
        self._ends.append(self._count)
        if wait:
            self.wait()

    def hear_no_more(self) -> None:
        """Losses that come from now on belong to nobody's step."""
        self._is_over = True

    def wait(self) -> None:
        """Know all losses so far."""
        if self._pinned is not None:
            self._probe.synchronize()
            self._values = [float(value) for value in self._pinned[: self._count]]

    def of(self, steps: Sequence[StepRecord]) -> tuple[StepRecord, ...]:
        """The steps with their losses, up to the first whose loss is still on its way; all as they are if no loss was ever seen."""
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
