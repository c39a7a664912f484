"""`bf16prof report`: runs in, one self-contained HTML file out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bf16prof.commands import options as o
from bf16prof.commands.output import check_files, hint, print_json, write_files
from bf16prof.reconcile import check_tolerance
from bf16prof.reports.views import run_views
from bf16prof.runs import REPORT, load


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
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
    loaded = [load(path) for path in runs]
    if not output and len(loaded) > 1:
        check_files([Path(REPORT)], force)
    files = output or [loaded[0].path / REPORT if len(loaded) == 1 else Path(REPORT)]
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
