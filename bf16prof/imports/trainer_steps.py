"""The steps of lines that do not say theirs, and the speed of a whole run of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bf16prof.imports.finding import Rates
from bf16prof.step_records import StepRecord
from bf16prof.summaries import not_finite

_STEP_KEYS = ("step", "global_step", "current_steps")
_MOST_BARS = 16
"""So many progress bars are told apart, by their ends."""


class LossLines:
    """Losses in the order of their lines, and where each progress bar stood then."""

    def __init__(self) -> None:
        self._bars: dict[int, int] = {}
        self._losses: list[float | None] = []
        self._said: list[int | None] = []
        self._at: dict[int, list[int | None]] = {}

    def bar(self, done: int, of: int) -> None:
        """A progress bar moves."""
        if of and done <= of and (of in self._bars or len(self._bars) < _MOST_BARS):
            self._bars[of] = done

    def add(self, pairs: Mapping[str, str]) -> None:
        """A line with a loss."""
        loss = float(pairs["loss"])
        for of, done in self._bars.items():
            if of not in self._at:
                self._at[of] = [None] * len(self._losses)
            self._at[of].append(done)
        self._losses.append(loss if math.isfinite(loss) else None)
        said = next((pairs[key] for key in _STEP_KEYS if key in pairs), "")
        self._said.append(int(said) if said.isdecimal() and len(said) <= 12 else None)

    @property
    def most_steps(self) -> int | None:
        """How many steps the run has: the end of the bar that goes with the losses."""
        return self._numbers()[1]

    def steps(self) -> tuple[tuple[StepRecord, ...], list[str]]:
        """The losses by step, of a step that comes twice the last; and notes."""
        if not self._losses:
            return (), []
        numbers, _ = self._numbers()
        notes = [] if self._is_said else ["steps are those of the progress bar" if numbers else "steps are not said: lines are counted"]
        by_step = dict(zip(numbers or range(len(self._losses)), self._losses, strict=True))
        if len(by_step) < len(self._losses):
            notes.append("some steps come twice: the last of them counts")
        steps = tuple(StepRecord(n, by_step[n], None, None, loss_not_finite=by_step[n] is None) for n in sorted(by_step))
        return steps, notes + not_finite([s.step for s in steps if s.loss is None], len(steps))

    @property
    def _is_said(self) -> bool:
        return bool(self._said) and None not in self._said

    def _numbers(self) -> tuple[list[int], int | None]:
        """The step of every line, and how many there are in all; empty where neither lines nor one
        bar say them all."""
        if self._is_said:
            return [n for n in self._said if n is not None], None
        candidates = {}
        for of, at in self._at.items():
            known = [n for n in at if n is not None]
            if len(known) == len(self._losses) and len(set(known)) == len(known):
                candidates[of] = known
        longest = max(candidates, default=None)
        return (candidates[longest], longest) if longest is not None else ([], None)


def run_rates(run: Mapping[str, float], steps: int | None) -> tuple[Rates, list[str]]:
    """The mean seconds of a step over the whole run: by its steps where they are known, else by the
    rate that is printed."""
    seconds, rate = run.get("train_runtime", 0.0), run.get("train_steps_per_second", 0.0)
    mean = seconds / steps if steps and seconds > 0 else 1 / rate if rate > 0 else 0.0
    if not math.isfinite(mean) or mean <= 0:
        return Rates(), []
    return Rates(mean_step_s=mean), [f"a step took {mean:.4g} s in the mean of the whole run, with init, evaluation and saving"]
