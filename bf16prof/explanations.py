"""The vocabulary of `bf16prof explain`: what an out-of-memory message says, what was predicted, and
what would fit.

`commands` puts it together from `imports`, `estimate` and `planning`; the reports show it. Bytes
are of one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from bf16prof.plans import Change, Plan
from bf16prof.vocabulary import STRICT, Phase, Size


@dataclass(frozen=True)
class MessageAmount:
    """One line of a message's arithmetic: what it is, its bytes, and what they mean."""

    __pydantic_config__ = STRICT

    name: str
    bytes: Size
    meaning: str = ""


@dataclass(frozen=True)
class Prediction:
    """What was predicted for the phase in which memory ran out (`None`: for the whole run).

    * `needed_bytes`: what the message proves at least, `rounding` bytes more or less.
      `limit_bytes`: what the allocator could have had.
    * `phases`: the predicted peak of each phase.
    """

    __pydantic_config__ = STRICT

    case: str
    phase: Phase | None
    peak_bytes: Size
    needed_bytes: Size | None
    rounding: Size
    limit_bytes: Size | None
    phases: dict[Phase, Size]

    @property
    def is_consistent(self) -> bool:
        """Whether the prediction is not below what the message proves."""
        return self.needed_bytes is None or self.peak_bytes >= self.needed_bytes - self.rounding

    @property
    def missing_bytes(self) -> int:
        """By how much the prediction is below what the message proves; 0 where it is not."""
        return 0 if self.is_consistent or self.needed_bytes is None else self.needed_bytes - self.peak_bytes


@dataclass(frozen=True)
class Explanation:
    """All that can be said of how a run ended.

    * `failure`: in one line; empty for a log without an out-of-memory message. `phase` and what
      says it (`evidence`).
    * `amounts`: the arithmetic of the message. `advice`: what follows from it alone.
    * `start`: the job as it was described, judged on a GPU (`judged_on`); `fits_with`: changes of
      it that fit, the best first; `saves`: others that save most.
    """

    __pydantic_config__ = STRICT

    failure: str
    phase: Phase | None = None
    evidence: str = ""
    rank: int | None = None
    gpu: int | None = None
    amounts: tuple[MessageAmount, ...] = ()
    advice: tuple[str, ...] = ()
    prediction: Prediction | None = None
    why_not_predicted: str = ""
    judged_on: str = ""
    start: Plan | None = None
    fits_with: tuple[Change, ...] = ()
    saves: tuple[Change, ...] = ()
