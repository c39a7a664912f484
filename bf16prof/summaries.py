"""What is said of many steps in one number or one line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def interquartile_range(times: Sequence[float]) -> float | None:
    """The distance of the upper quartile from the lower one, in the unit of the times; `None` of
    fewer than two."""
    if len(times) < 2:
        return None
    quartiles = statistics.quantiles(times, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


def not_finite(lost: Sequence[int], steps: int) -> list[str]:
    """A note that these of so many steps had no finite loss; none if all had one."""
    return [f"the loss was not finite in {len(lost)} of {steps} steps, first in step {lost[0]}"] if lost else []
