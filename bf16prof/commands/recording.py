"""Lets the estimate of a command have recorded what it needs: before it starts, all at once; and
what it asks for later, one by one."""

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
    from bf16prof.signatures.inquiry import Inquiry
    from bf16prof.signatures.signature import Signature
    from bf16prof.tracing.session import Session

DOING = "recording the model's own code"

SAY_AFTER_S = 1.0
"""Seconds after which somebody who waits is told for what, where there is no terminal to draw
on."""


def record_for(jobs: Sequence[Job], *, trace: bool, quiet: bool, searches: bool = False) -> None:
    """Record the passes of these jobs' models as far as they are not known (`estimate.anatomy`),
    unless the user does not want it.

    `searches`: whether more of the same models will be asked for, on other batches and lengths.
    What cannot be recorded has its reason, which the estimate gives.
    """
    from bf16prof.closed_form.anatomy import inquiries_of
    from bf16prof.signatures import store
    from bf16prof.signatures.inquiry import can_trace

    if not trace or not all(can_trace(job.profile.model) for job in jobs):
        store.trace_with(None)
        return

    progress = RecordingProgress(quiet)

    def answer(asked: Sequence[Inquiry]) -> None:
        if asked:
            with progress.of(len(asked)):
                _session().answer(asked, progress.say)

    first = store.missing(inquiries_of(jobs))
    answer(first)
    search = RecordedSearch(progress, first)
    store.trace_with(lambda inquiries: answer([each for each in store.missing(inquiries) if not (searches and search.covers(each))]))


class RecordedSearch:
    """Records a few passes of a model for all of those that a search goes on to ask for: at one
    length those of any batch, and when it asks for another length those of any. `first`: what was
    recorded as it is before the search."""

    def __init__(self, progress: RecordingProgress, first: Sequence[Inquiry]) -> None:
        self._progress = progress
        self._lengths: dict[str, set[int]] = {}
        self._tried: set[tuple[str, tuple[int, ...]]] = set()
        for inquiry in first:
            self._lengths_of(inquiry)

    def _lengths_of(self, inquiry: Inquiry) -> set[int]:
        """The lengths that the inquiry's model was asked for, this one included."""
        lengths = self._lengths.setdefault(inquiry.general, set())
        lengths.add(inquiry.point[1])
        return lengths

    def covers(self, inquiry: Inquiry) -> bool:
        """Whether the inquiry is answered now by what holds of more than its own point."""
        from bf16prof.signatures import store
        from bf16prof.signatures.sampling import generalized

        (batch, length), name = inquiry.point, inquiry.general
        wanted = (length,) if len(self._lengths_of(inquiry)) == 1 else ()
        if not name or (name, wanted) in self._tried or (wanted and batch == 1):
            return False
        self._tried.add((name, wanted))

        def record(inquiries: Sequence[Inquiry]) -> dict[str, Signature]:
            with self._progress.of(len(inquiries)):
                return _session().record(inquiries, self._progress.say)

        if (found := generalized(inquiry, record, wanted)) is not None:
            store.keep_general(inquiry, found)
        return store.missing([inquiry]) == []


@functools.cache
def _session() -> Session:
    """One for all calls of a process: each has a process of its own, which lives as long as this
    one."""
    from bf16prof.tracing.session import Session

    return Session()


class RecordingProgress:
    """A bar where stderr is a terminal; elsewhere one line, once, when it takes longer than a
    moment; nothing when quiet."""

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
