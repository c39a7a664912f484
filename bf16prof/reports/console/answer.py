"""The answer of a command that has runs to show: one screen, or with `-v` everything that is
known."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from bf16prof.reports.console.breakdown import breakdown
from bf16prof.reports.console.outcome import outcome
from bf16prof.reports.console.reconciliation import reconciliation
from bf16prof.reports.console.run import failures
from bf16prof.runs import Run


def answer(runs: Sequence[Run], console: Console, *, verbose: bool) -> None:
    """Print what was asked, the verdict, the picture, the table and what failed; verbosely every
    quantity and item of every case."""
    if verbose:
        reconciliation(runs, console)
    else:
        outcome(runs, console)
    for run in runs:
        failures(run, console, named=len(runs) > 1)
        for record in run.records if verbose else ():
            breakdown(record, console)
