"""`bf16prof report`: runs in, one self-contained HTML file out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bf16prof.commands import options as o
from bf16prof.commands.output import check_files, hint, print_json, told_run, write_files
from bf16prof.reconcile import check_tolerance
from bf16prof.records import Device
from bf16prof.reports.views import run_views
from bf16prof.runs import MANIFEST, REPORT, Run, load


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or published:NAME: a run of the literature.")],
    output: o.FilesOption = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the HTML report in a browser.", rich_help_panel=o.OUTPUT)] = False,
    json_: o.JsonOption = False,
    force: o.ForceOption = False,
    fail_over: o.TolerateOption = None,
    quiet: o.QuietOption = False,
) -> None:
    """Reconcile runs again and write one report over all of them.

    If --output names no file, one run directory gets its own report.html anew.

    Several runs, or a published one, get ./report.html, which replaces an older such page but no other file.

    With --json no page is written that --output or --open does not ask for.
    """
    check_files(output, force)
    tolerance = None if fail_over is None else o.percentage(fail_over)
    loaded = [_load(path) for path in runs]
    files = output or ([_own_page(runs, force)] if open_ or not json_ else [])
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


def _own_page(runs: list[Path], force: bool) -> Path:
    """Where the page of these runs goes if nobody says. Raises `InputError` where that is another file, or the page of a run's own."""
    if len(runs) == 1 and _published_name(runs[0]) is None:
        return (runs[0].parent if runs[0].name == MANIFEST else runs[0]) / REPORT
    page = Path(REPORT)
    check_files([page], force or (_is_page(page) and not Path(MANIFEST).exists()))
    return page


def _is_page(path: Path) -> bool:
    """Whether a file is a report over runs that this program has written, as its head says."""
    try:
        return GENERATOR in path.read_bytes()[:2000]
    except OSError:
        return False


GENERATOR = b'<meta name="generator" content="bf16prof memory report">'


def _published_name(path: Path) -> str | None:
    from bf16prof.imports.published import PREFIX

    return str(path).removeprefix(PREFIX) if str(path).startswith(PREFIX) else None


def _load(path: Path) -> Run:
    """A run directory, or a published run with its estimate, made at this moment; when the publication's runs were made nobody says."""
    name = _published_name(path)
    if name is None:
        return load(path)
    from bf16prof.cases import Selection, expand
    from bf16prof.estimate.predict import predictions
    from bf16prof.imports.published import find_published

    found = find_published(name)
    cases = [record.case for record in found.records]
    jobs = expand(Selection(found.profile, [cases[0].zero_stage], [cases[0].world_size], [c.recipe for c in cases], Device.GPU, found.gpu))
    return told_run(f"{found.name}, published", [*found.records, *predictions(jobs)], found.profile.model_dump(mode="json"), found.origins)
