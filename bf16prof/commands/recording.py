"""Lets the estimate of a command have recorded what it needs: before it starts, all at once; and what it asks for later, one by one."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import typer

from bf16prof.cases import Job

SAY_AFTER_S = 1.0
"""Seconds after which somebody who waits is told for what, where there is no terminal to draw on."""


def record_for(jobs: Sequence[Job], *, trace: bool, quiet: bool) -> None:
    """Record the passes of these jobs' models as far as they are not known (`estimate.anatomy`), unless the user does not want it.

    What cannot be recorded has its reason, which the estimate gives.
    """
    from bf16prof.estimate.anatomy import inquiries_of
    from bf16prof.signatures import store
    from bf16prof.signatures.inquiry import Inquiry, can_trace
    from bf16prof.tracing.session import Session

    if not trace or not can_trace():
        store.trace_with(None)
        return

    session = Session()

    def ask(inquiries: Sequence[Inquiry]) -> None:
        if asked := store.missing(inquiries):
            with RecordingProgress(len(asked), quiet) as progress:
                session.answer(asked, progress.say)

    ask(inquiries_of(jobs))
    store.trace_with(ask)


class RecordingProgress:
    """A bar where stderr is a terminal; elsewhere one line when it takes longer than a moment; nothing when quiet."""

    def __init__(self, count: int, quiet: bool) -> None:
        import rich.progress as r

        from bf16prof.reports.console import make_console

        self._is_silent = quiet or sys.stderr.isatty()
        self._begun, self._count = time.monotonic(), count
        columns = (
            r.BarColumn(bar_width=20),
            r.MofNCompleteColumn(),
            r.TimeElapsedColumn(),
            r.TextColumn("{task.description}", markup=False),
        )
        disable = quiet or not sys.stderr.isatty()
        self._progress = r.Progress(*columns, console=make_console(stderr=True), disable=disable, transient=True)
        self._task = self._progress.add_task("recording the model's own code", total=count)

    def say(self, done: int, _: int, words: str) -> None:
        """So many are recorded, and this is going on."""
        self._progress.update(self._task, completed=done, description=f"recording the model's own code: {words}")
        if not self._is_silent and time.monotonic() - self._begun > SAY_AFTER_S:
            self._is_silent = True
            passes = "a pass" if self._count == 1 else f"{self._count} passes"
            typer.echo(f"recording {passes} of the model's own code, once ...", err=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.stop()
