"""Where results go: a file whose suffix picks the format, or one JSON document on stdout; hints and
errors on stderr."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from bf16prof.commands.engines import is_on_megatron
from bf16prof.documents import json_text, raw_document
from bf16prof.errors import DoesNotFit, InputError
from bf16prof.files import write_bytes, write_text
from bf16prof.profiles.gpus import Gpu
from bf16prof.records import MemoryRecord
from bf16prof.reports.asked import settings
from bf16prof.reports.figure_names import DEFAULT_FIGURE, SUFFIXES, require_name
from bf16prof.reports.trace import is_trace, trace
from bf16prof.reports.units import inert
from bf16prof.reports.verdict import verdict
from bf16prof.runs import OWN_FILES, REPORT, CaseStatus, Manifest, Run, Status, command_line, now
from bf16prof.vocabulary import Device, Verdict

FORMATS = (".json", ".csv", ".md", ".html")

OTHER_OUTPUTS = ("write", "snapshot")
"""Flags beside `--output` that name a file to write."""


def check_outputs(given: Mapping[str, Any]) -> None:
    """Raise `InputError`, before any work is done, for a file that cannot or must not be written,
    of a command's parameters.

    A suffix without a format, a missing folder, a folder in its place, a file that exists (but for
    `--force`), one file for two outputs; and, whatever `--force` says, a file that the command
    reads or that is the run's own.
    """
    outputs = [("--output", path) for path in given.get("output") or ()]
    for flag, path in outputs:
        known = FORMATS + SUFFIXES if "figure" in given else FORMATS
        if path.suffix not in known:
            raise InputError(f"{flag} {path}: the suffix picks the format; known: {', '.join(known)}")
    _check_figure(given, [path for _, path in outputs])
    outputs += [(f"--{name}", path) for name in OTHER_OUTPUTS if (path := given.get(name)) is not None]
    taken = {os.path.realpath(path): "which the command reads" for path in _inputs(given)}
    folder = given.get("output_dir")
    taken |= {os.path.realpath(folder / name): "a file of the run itself" for name in OWN_FILES if folder is not None}
    for flag, path in outputs:
        if reason := taken.get(real := os.path.realpath(path)):
            raise InputError(f"{flag} {path}: {reason}", hint="choose another name")
        check_path(flag, path, bool(given.get("force")))
        taken[real] = "written to by another flag" if path.is_file() or not path.exists() else ""


def _check_figure(given: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Raise `InputError` for a figure that nobody knows or that goes nowhere, and for a picture
    that cannot be drawn here."""
    name, drawn = given.get("figure"), [path for path in files if path.suffix in SUFFIXES]
    if name:
        require_name(name)
        if not drawn:
            raise InputError(f"--figure {name}: no file for it", hint=f"add -o {name}.png (or {', '.join(SUFFIXES[1:])})")
    if drawn:
        from bf16prof.reports import pictures

        pictures.require_drawing()


def _inputs(given: Mapping[str, Any]) -> list[Path]:
    """The files and run directories' files that a command's parameters name for reading."""
    values = [value for name, value in given.items() if name not in ("output", "output_dir", *OTHER_OUTPUTS)]
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    paths = [Path(item) for item in flat if isinstance(item, Path | str) and item]
    return paths + [path / name for path in paths for name in OWN_FILES - {REPORT}]


def check_path(flag: str, path: Path, force: bool) -> None:
    """Raise `InputError` for a file that cannot be written: its folder is missing, or it exists and
    nobody said `--force`."""
    try:
        if not path.parent.is_dir():
            raise InputError(f"{flag} {path}: the folder {path.parent} does not exist")
        if path.is_dir() or path.is_block_device():
            raise InputError(f"{flag} {path}: not a file")
        if path.is_file() and not force:
            raise InputError(f"{flag} {path}: the file exists", hint="add --force to replace it")
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from error


def print_json(records: Sequence[MemoryRecord], **more: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json_text(raw_document(tuple(records), **more)))


def write_files(files: Sequence[Path] | None, runs: Sequence[Run], *, force: bool, figure: str = "", **more: Any) -> None:
    """Write every file in the format of its suffix; a file that has appeared since `check_outputs`
    stays, but for `force`.

    `figure`: which one a picture shows, by its name.
    """
    for path in files or ():
        write_bytes(path, _render(path, runs, figure, more), replace=force)


def _render(path: Path, runs: Sequence[Run], figure: str, more: dict[str, Any]) -> bytes:
    if path.suffix in SUFFIXES:
        from bf16prof.reports import pictures

        return pictures.picture(runs, figure or DEFAULT_FIGURE, path.suffix)
    return _text(path, runs, more).encode()


def _text(path: Path, runs: Sequence[Run], more: dict[str, Any]) -> str:
    records = [record for run in runs for record in run.records]
    if is_trace(path.name):
        return trace(runs)
    if path.suffix == ".json":
        return json_text(raw_document(records, **more)) + "\n"
    if path.suffix == ".html":
        from bf16prof.reports.html import render

        return render(runs)
    from bf16prof.reports import tables

    return tables.to_markdown(runs) if path.suffix == ".md" else tables.to_csv(runs)


def write_report(run: Run) -> None:
    """Write the HTML report of a run into its folder."""
    from bf16prof.reports.html import render

    write_text(run.path / REPORT, render([run]))


def finished_run(
    name: str,
    records: Sequence[MemoryRecord],
    profile: dict[str, Any],
    origins: Mapping[str, str],
    *,
    status: Status = Status.FINISHED,
    message: str = "",
) -> Run:
    """Records as a run that is not on disk, so that reports treat them like any other: made now, by
    this command.

    `status`, `message`: how it ended, where it is an imported one that did not finish.
    """
    done = now()
    return told_run(name, records, profile, origins, created=done, finished=done, argv=command_line(), status=status, message=message)


def told_run(
    name: str,
    records: Sequence[MemoryRecord],
    profile: dict[str, Any],
    origins: Mapping[str, str],
    *,
    created: str = "",
    finished: str | None = None,
    argv: tuple[str, ...] = (),
    status: Status = Status.FINISHED,
    message: str = "",
) -> Run:
    """The same of records of which nobody says when they were made and how."""
    cases = tuple(CaseStatus(case, status, message) for case in dict.fromkeys(record.case for record in records))
    manifest = Manifest(name, created, status, records[0].device, argv, cases, profile, finished=finished, origins=dict(origins))
    return Run(Path(), manifest, tuple(records))


def show_settings(profile: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Print every resolved setting with where it comes from."""
    from bf16prof.reports.console import make_console, settings_table

    settings_table(settings(profile, origins), make_console())


def report_hints(folder: Path, quiet: bool) -> None:
    """Where the report of a run is, which is always said, and how to open it."""
    hint(f"report: {folder / REPORT}", False)
    hint(f"next: bf16prof report {folder} --open", quiet)


def with_host_per_node(records: Sequence[MemoryRecord], per_node: int) -> list[MemoryRecord]:
    """The records with what all ranks of a node hold in host memory, `per_node` of them at most."""
    return [
        record
        if record.host_bytes is None
        else dataclasses.replace(record, host_bytes_per_node=record.host_bytes * min(per_node, record.case.world_size))
        for record in records
    ]


def check_judged_device(wanted: bool, device: Device) -> None:
    """Raise `InputError` where a verdict is demanded of CPU ranks, which have none."""
    if wanted and device is Device.CPU:
        raise InputError("--fail-unless-fits: only a GPU has a limit to fit", hint="leave --device cpu out")


def require_fit(records: Sequence[MemoryRecord], wanted: bool) -> None:
    """Raise `DoesNotFit`, if that is wanted, unless every record's verdict is that it fits."""
    others = [record for record in records if record.verdict is not Verdict.FITS]
    if not wanted or not others:
        return
    first = others[0]
    said = verdict(first)
    why = said.short if said else "whether it fits is not known"
    raise DoesNotFit(
        f"--fail-unless-fits: {len(others)} of {len(records)} cases do not; {first.case.label}: {why}",
        hint="bf16prof simulate finds the peak" if is_on_megatron(first) else "bf16prof plan with the same flags looks for what fits",
    )


def hint(text: str, quiet: bool) -> None:
    """One line of advice on stderr."""
    if not quiet:
        typer.echo(inert(text, None), err=True)


def hint_caveats(gpu: Gpu | None, quiet: bool) -> None:
    """What predictions for a GPU take from another one, where no record is shown in full with its
    notes."""
    for caveat in gpu.caveats() if gpu else ():
        hint(caveat, quiet)
