"""A line on stderr while something takes its time: what is done, how much of it, for how long. Only
on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def working(what: str, total: int | None, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show `what`; the function that it gives is called with how many are done. Of an unknown
    `total` the number alone is shown."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    import rich.progress as r

    from bf16prof.reports.console.layout import make_console

    counted = r.MofNCompleteColumn() if total is not None else r.TextColumn("{task.completed:,}")
    columns = (r.SpinnerColumn(), r.TextColumn("{task.description}", markup=False), counted, r.TimeElapsedColumn())
    with r.Progress(*columns, console=make_console(stderr=True), transient=True, refresh_per_second=5) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
