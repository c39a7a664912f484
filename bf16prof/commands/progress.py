"""The progress of measurements and of dry runs on a terminal: case, phase, step, loss, layer and
memory of rank 0, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import typer

from bf16prof.cases import Job
from bf16prof.dry_run.runner import DryRunWatcher
from bf16prof.dry_run.task import Progress
from bf16prof.measuring.results import RankResult
from bf16prof.measuring.session import Watcher
from bf16prof.runs import CaseStatus, Status


class _Bar:
    """A bar that is drawn between entry and exit."""

    _progress: Any

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.stop()


class ProgressWatcher(_Bar, Watcher):
    """Draws a bar where stderr is a terminal; elsewhere one line per case; nothing when quiet."""

    def __init__(self, cases: int, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from bf16prof.reports.console import make_console

        self._cases = cases
        self._quiet = quiet
        self._interactive = sys.stderr.isatty() and not quiet
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=make_console(stderr=True), disable=not self._interactive, transient=True)
        self._task = self._progress.add_task("starting", total=cases)
        self._label = ""

    def preparing(self, what: str) -> None:
        """Compiling takes up to a minute the first time."""
        self._say(what)

    def case_begins(self, index: int, job: Job) -> None:
        """Name the case that starts."""
        self._label = f"[{index + 1}/{self._cases}] {job.case.label}"
        self._progress.update(self._task, completed=index)
        self._say(f"{self._label}: starting {job.case.world_size} ranks")

    def progress(self, result: RankResult) -> None:
        """Step, loss and memory of rank 0."""
        from bf16prof.reports.units import gib

        if not result.steps:
            text = "engine is built" if result.parameters else "building the engine"
        else:
            last = result.steps[-1]
            loss = "not finite" if last.loss is None else f"{last.loss:.3f}"
            text = f"step {last.step + 1}  loss {loss}  peak {gib(result.run_peak_bytes)}"
        self._progress.update(self._task, description=f"{self._label}: rank {result.rank}: {text}")

    def case_ends(self, status: CaseStatus) -> None:
        """One more done; a failure is said at once."""
        self._progress.advance(self._task)
        if status.status is not Status.FINISHED:
            self._print(f"{self._label}: {status.status}: {status.message}")

    def _say(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if not self._interactive and not self._quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        from bf16prof.reports.units import inert

        if self._interactive:
            self._progress.console.print(inert(text, None), markup=False, highlight=False)
        else:
            typer.echo(inert(text, None), err=True)


class SimulationProgress(_Bar, DryRunWatcher):
    """Draws a bar where stderr is a terminal: how many dry runs are done, and of those that run the
    phase, the layer and the bytes."""

    def __init__(self, jobs: Sequence[Job], quiet: bool) -> None:
        import rich.progress as r

        from bf16prof.reports.console import make_console

        self._jobs = jobs
        columns = (
            r.BarColumn(bar_width=20),
            r.MofNCompleteColumn(),
            r.TimeElapsedColumn(),
            r.TextColumn("{task.description}", markup=False),
        )
        disable = quiet or not sys.stderr.isatty()
        self._progress = r.Progress(*columns, console=make_console(stderr=True), disable=disable, transient=True)
        self._task = self._progress.add_task("dry run: importing DeepSpeed", total=len(jobs))

    def progress(self, done: int, running: Sequence[tuple[int, Progress]]) -> None:
        """Show where the dry runs are."""
        words = "; ".join(f"{self._jobs[index].case.label}: {_where(progress)}" for index, progress in running)
        self._progress.update(self._task, completed=done, description=words or "dry run: importing DeepSpeed")


class ScriptProgress(_Bar):
    """The same for a script's dry run."""

    def __init__(self, name: str, quiet: bool) -> None:
        import rich.progress as r

        from bf16prof.reports.console import make_console

        self._name = name
        columns = (r.SpinnerColumn(), r.TimeElapsedColumn(), r.TextColumn("{task.description}", markup=False))
        disable = quiet or not sys.stderr.isatty()
        self._progress = r.Progress(*columns, console=make_console(stderr=True), disable=disable, transient=True)
        self._task = self._progress.add_task(f"{name}: importing", total=None)

    def __call__(self, progress: Progress) -> None:
        """Show where it is."""
        self._progress.update(self._task, description=f"{self._name}: {_where(progress)}")


def _where(progress: Progress) -> str:
    """`step 2 backward, layer 3 of 32, 18.80 GiB`."""
    from bf16prof.reports.units import gib

    phase = f"{progress.phase or 'between phases'}"
    step = "" if progress.step < 0 else f"step {progress.step + 1} "
    layer = f", {progress.layer}" if progress.layer else ""
    return f"{step}{phase}{layer}, {gib(progress.allocated_bytes)}"
