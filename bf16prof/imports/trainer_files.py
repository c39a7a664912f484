"""The JSON files that the Trainer of Hugging Face leaves: `trainer_state.json` (the history of its
log lines, with their steps), and `all_results.json` or `train_results.json` (the metrics of the
end, unrounded)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bf16prof.imports.finding import Finding, Rates, Reading
from bf16prof.imports.trainer_memory import memory_readings
from bf16prof.imports.trainer_steps import run_rates
from bf16prof.step_records import StepRecord
from bf16prof.summaries import not_finite

_RESULTS = {"train_runtime", "train_loss", "train_samples_per_second", "train_mem_gpu_alloc_delta"}


def is_trainers(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is one of these files."""
    return isinstance(content.get("log_history"), list) or bool(content.keys() & _RESULTS)


class TrainerFilesReader:
    """Reads objects; the losses of several `trainer_state.json` are several runs."""

    format = "the Trainer's JSON files"

    def __init__(self) -> None:
        self._losses: dict[int, float | None] = {}
        self._memory: dict[str, Reading] = {}
        self._run: dict[str, float] = {}
        self._steps: int | None = None
        self._is_read = False

    def read(self, content: Mapping[str, Any]) -> tuple[int, int]:
        """Read a file; how many entries were understood, and how many were not. Raises `ValueError`
        for a second history."""
        history = content.get("log_history")
        if not isinstance(history, list):
            self._metrics(content)
            return 1, 0
        if self._is_read:
            raise ValueError("a second trainer_state.json: these are several runs")
        self._is_read = True
        steps = content.get("global_step")
        self._steps = steps if _is_count(steps) and steps else None
        good = sum(self._entry(entry) for entry in history)
        return good, len(history) - good

    def finding(self) -> Finding | None:
        """The steps with their losses, and the memory of the end."""
        steps = tuple(StepRecord(n, loss, None, None, loss_not_finite=loss is None) for n, loss in sorted(self._losses.items()))
        readings, notes = memory_readings(self._memory)
        rates, more = run_rates(self._run, self._steps)
        if not (steps or readings or rates != Rates()):
            return None
        notes += [*more, *not_finite([step.step for step in steps if step.loss is None], len(steps))]
        return Finding(self.format, readings, steps=steps, notes=tuple(f"{self.format}: {n}" for n in notes), rates=rates)

    def _entry(self, entry: object) -> bool:
        if not isinstance(entry, dict):
            return False
        step, loss = entry.get("step"), entry.get("loss")
        if isinstance(step, int) and _is_count(step) and isinstance(loss, int | float) and not isinstance(loss, bool):
            self._losses[step] = float(loss) if abs(loss) < 1e300 and math.isfinite(loss) else None
            return True
        self._metrics(entry)
        return any(str(key).startswith(("train_", "eval_")) for key in entry)

    def _metrics(self, content: Mapping[str, Any]) -> None:
        for name, value in content.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if "_mem_" in name and isinstance(value, int) and abs(value) < 2**60:
                self._memory[name] = Reading(value)
            elif name.startswith("train_") and abs(value) < 1e300:
                self._run[name] = float(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
