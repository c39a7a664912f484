"""`bf16prof report`: runs in, one self-contained HTML file out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from bf16prof.claims import is_report, owned
from bf16prof.commands import options as o
from bf16prof.commands.output import check_outputs, check_path, hint, print_json, told_run, write_files
from bf16prof.errors import InputError
from bf16prof.reconcile import check_tolerance
from bf16prof.reports import trackers
from bf16prof.reports.views import run_views
from bf16prof.runs import MANIFEST, REPORT, Run, load


def report(
    context: typer.Context,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or published:NAME: a run of the literature.")],
    output: o.PageFilesOption = None,
    figure: o.FigureOption = "",
    open_: Annotated[bool, typer.Option("--open", help="Show the HTML report in a browser.", rich_help_panel=o.OUTPUT)] = False,
    json_: o.JsonOption = False,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="FOLDER", help="Also write runs of TensorBoard.", rich_help_panel=o.OUTPUT)
    ] = None,
    wandb: Annotated[
        str | None, typer.Option("--wandb", metavar="PROJECT", help="Also log to Weights & Biases.", rich_help_panel=o.OUTPUT)
    ] = None,
    force: o.ForceOption = False,
    fail_over: o.TolerateOption = None,
    verbose: o.VerboseOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Reconcile runs again and write one report over all of them.

    If --output names no file, one run directory gets its own report.html anew.

    Several runs, or a published one, get ./report.html, which replaces an older such page but no
    other file.

    With --json no page is written that --output or --open does not ask for.
    """
    check_outputs(context.params)
    _check_trackers(tensorboard, wandb)
    tolerance = None if fail_over is None else o.percentage(fail_over)
    loaded = [_load(path) for path in runs]
    files = output or ([_own_page(runs)] if open_ or not json_ else [])
    records = [record for run in loaded for record in run.records]
    comparisons = [comparison for view in run_views(loaded) for comparison in view.comparisons]
    if output:
        write_files(output, loaded, force=force, figure=figure, comparisons=comparisons)
    elif files:
        _write_page(files[0], loaded, force, of_these=_is_own_run(runs))
    if json_:
        print_json(records, comparisons=comparisons)
    else:
        from bf16prof.reports.console import answer, learning, make_console

        console = make_console()
        answer(loaded, console, verbose=verbose)
        if not verbose:  # else it is among the rest
            learning(loaded, console)
    for path in files:
        hint(f"wrote {path}", quiet)
    _track(loaded, tensorboard, wandb, quiet)
    if open_:
        typer.launch(str(next((f for f in files if f.suffix == ".html"), files[0]).resolve().as_uri()))
    if tolerance is not None:
        check_tolerance(comparisons, tolerance)


def _check_trackers(tensorboard: Path | None, wandb: str | None) -> None:
    """Raise `InputError` where a tracker's library is missing, or its folder is something else."""
    if tensorboard is not None:
        trackers.require("tensorboard", "--tensorboard")
        if tensorboard.exists() and not tensorboard.is_dir():
            raise InputError(f"--tensorboard {tensorboard}: not a folder")
    if wandb is not None:
        trackers.require("wandb", "--wandb")


def _track(loaded: list[Run], tensorboard: Path | None, wandb: str | None, quiet: bool) -> None:
    if tensorboard is not None:
        trackers.to_tensorboard(loaded, tensorboard)
        hint(f"next: tensorboard --logdir {tensorboard}", quiet)
    if wandb is not None:
        trackers.to_wandb(loaded, wandb)


def _own_page(runs: list[Path]) -> Path:
    """Where the page of these runs goes if nobody says: into the folder of the only one, else
    here."""
    if _is_own_run(runs):
        return (runs[0].parent if runs[0].name == MANIFEST else runs[0]) / REPORT
    return Path(REPORT)


def _is_own_run(runs: list[Path]) -> bool:
    """Whether these are one run directory, which has a page of its own: a published run has
    none."""
    return len(runs) == 1 and _published_name(runs[0]) is None


def _write_page(page: Path, loaded: list[Run], force: bool, *, of_these: bool) -> None:
    """Write the page that nobody named, in the place of an older one of ours only, and of one run
    only if it is `of_these`.

    Raises `InputError` where another file has that name, where it is the page of a run of its own,
    and while that run is written.
    """
    of_run = (page.parent / MANIFEST).exists()
    replace = force or (is_report(page) and (not of_run or of_these))
    check_path("--output", page, replace)
    with owned(page.parent) if of_run else contextlib.nullcontext():
        write_files([page], loaded, force=replace)


def _published_name(path: Path) -> str | None:
    from bf16prof.imports.published import PREFIX

    return str(path).removeprefix(PREFIX) if str(path).startswith(PREFIX) else None


def _join_ranks(folder: Path) -> None:
    """Make a run of what the ranks of a script have written there, if that is new."""
    from bf16prof.measuring.script.join import join, joins

    if joins(folder):
        with owned(folder):
            join(folder)


def _load(path: Path) -> Run:
    """A run directory, or a published run with its estimate, made at this moment; when the
    publication's runs were made nobody says."""
    name = _published_name(path)
    if name is None:
        _join_ranks(path.parent if path.name == MANIFEST else path)
        return load(path)
    from bf16prof.closed_form.predict import predictions
    from bf16prof.imports.published import find_published
    from bf16prof.profiles.identity import recorded

    found = find_published(name)
    resolved = found.runs[0].resolved
    predicted = predictions([run.job for run in found.runs])
    return told_run(f"{found.name}, published", [*found.records, *predicted], recorded(resolved.profile), resolved.origins)
