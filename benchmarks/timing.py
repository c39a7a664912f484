"""Whole processes and calls, timed in turn (A B A B ...) so that ratios hold when the machine's
speed drifts; medians are quoted."""

from __future__ import annotations

import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable

ROUNDS = 7


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, without garbage collection, as the program runs."""
    return timeit.timeit(work, number=1)


def process(*command: str) -> Callable[[], object]:
    """A call that runs a command to its end and throws its output away."""
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bf16prof(*words: str) -> Callable[[], object]:
    """A call of `bf16prof WORDS`."""
    return process(sys.executable, "-m", "bf16prof", *words)


def python(code: str) -> Callable[[], object]:
    """A call of `python -c CODE`."""
    return process(sys.executable, "-c", code)


def ratio(name: str, ours: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> None:
    """Time both in turn and print the median of each and of the ratio."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(rounds)]
    own, reference = (statistics.median(times) for times in zip(*pairs, strict=True))
    quotient = statistics.median(a / b for a, b in pairs)
    say(name, f"{own:7.3f} s  {reference:7.3f} s  ratio {quotient:5.2f}")


def say(name: str, figures: str) -> None:
    """One line of a benchmark."""
    sys.stdout.write(f"{name:<66} {figures}\n")
    sys.stdout.flush()
