"""Lets the estimate of a command have recorded what it needs: before it starts, all at once; and what it asks for later, one by one."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from bf16prof.cases import Job

if TYPE_CHECKING:
    from bf16prof.tracing.session import Session

DOING = "recording the model's own code"

SAY_AFTER_S = 1.0
"""Seconds after which somebody who waits is told for what, where there is no terminal to draw on."""


def record_for(jobs: Sequence[Job], *, trace: bool, quiet: bool) -> None:
    """Record the passes of these jobs' models as far as they are not known (`estimate.anatomy`), unless the user does not want it.

    What cannot be recorded has its reason, which the estimate gives.
    """
    from bf16prof.closed_form.anatomy import inquiries_of
    from bf16prof.signatures import store
    from bf16prof.signatures.inquiry import Inquiry, can_trace

    if not trace or not can_trace():
        store.trace_with(None)
        return

    session, progress = _session(), RecordingProgress(quiet)

    def ask(inquiries: Sequence[Inquiry]) -> None:
        if asked := store.missing(inquiries):
            with progress.of(len(asked)):
                session.answer(asked, progress.say)

    ask(inquiries_of(jobs))
    store.trace_with(ask)


@functools.cache
def _session() -> Session:
    """One for all calls of a process: each has a process of its own, which lives as long as this one."""
    from bf16prof.tracing.session import Session

    return Session()


class RecordingProgress:
    """A bar where stderr is a terminal; elsewhere one line, once, when it takes longer than a moment; nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self._is_drawn = sys.stderr.isatty() and not quiet
        self._is_silent = quiet or self._is_drawn
        self._begun = 0.0
        self._show: Callable[[int, str], None] = lambda done, words: None

    @contextlib.contextmanager
    def of(self, count: int) -> Iterator[None]:
        """While so many passes are recorded."""
        import rich.progress as r

        from bf16prof.reports.console import make_console

        self._begun = time.monotonic()
        words = r.TextColumn("{task.description}", markup=False)
        columns = (r.BarColumn(bar_width=20), r.MofNCompleteColumn(), r.TimeElapsedColumn(), words)
        bar = r.Progress(*columns, console=make_console(stderr=True), disable=not self._is_drawn, transient=True)
        task = bar.add_task(DOING, total=count)
        self._show = lambda done, words: bar.update(task, completed=done, description=f"{DOING}: {words}")
        with bar:
            yield

    def say(self, done: int, _: int, words: str) -> None:
        """So many are recorded, and this is going on."""
        self._show(done, words)
        if not self._is_silent and time.monotonic() - self._begun > SAY_AFTER_S:
            self._is_silent = True
            typer.echo(f"{DOING}, once ...", err=True)
