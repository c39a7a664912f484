"""`bf16prof report`: runs in, one self-contained HTML file out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bf16prof.commands import options as o
from bf16prof.commands.output import check_files, finished_run, hint, print_json, write_files
from bf16prof.reconcile import check_tolerance
from bf16prof.records import Device
from bf16prof.reports.views import run_views
from bf16prof.runs import REPORT, Run, load


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or published:NAME: a run of the literature.")],
    output: o.FilesOption = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the HTML report in a browser.", rich_help_panel=o.OUTPUT)] = False,
    json_: o.JsonOption = False,
    force: o.ForceOption = False,
    fail_over: o.TolerateOption = None,
    quiet: o.QuietOption = False,
) -> None:
    """Reconcile runs again and write one report over all of them; a single run's own report.html is written anew if no file is named."""
    check_files(output, force)
    tolerance = None if fail_over is None else o.percentage(fail_over)
    loaded = [_load(path) for path in runs]
    own = loaded[0].path if len(loaded) == 1 else Path()
    if not output and own == Path():
        check_files([Path(REPORT)], force)
    files = output or [own / REPORT]
    records = [record for run in loaded for record in run.records]
    comparisons = [comparison for view in run_views(loaded) for comparison in view.comparisons]
    write_files(files, loaded, comparisons=comparisons)
    if json_:
        print_json(records, comparisons=comparisons)
    else:
        from bf16prof.reports.console import make_console, reconciliation

        reconciliation(loaded, make_console())
    for path in files:
        hint(f"wrote {path}", quiet)
    if open_:
        typer.launch(str(next((f for f in files if f.suffix == ".html"), files[0]).resolve().as_uri()))
    if tolerance is not None:
        check_tolerance(comparisons, tolerance)


def _load(path: Path) -> Run:
    """A run directory, or a published run with its estimate, made at this moment."""
    from bf16prof.imports.published import PREFIX, find_published

    if not str(path).startswith(PREFIX):
        return load(path)
    from bf16prof.cases import Selection, expand
    from bf16prof.estimate.predict import predictions

    found = find_published(str(path).removeprefix(PREFIX))
    cases = [record.case for record in found.records]
    jobs = expand(Selection(found.profile, [cases[0].zero_stage], [cases[0].world_size], [c.recipe for c in cases], Device.GPU, found.gpu))
    return finished_run(f"{found.name}, published", [*found.records, *predictions(jobs)], found.profile.model_dump(mode="json"))
