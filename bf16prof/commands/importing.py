"""`bf16prof import`: what others logged of one run, joined, with the estimate of the same case
beside it."""

from __future__ import annotations

import dataclasses

from bf16prof.claims import claimed
from bf16prof.commands import options as o
from bf16prof.commands.flags import Asked, ImportFlags, takes
from bf16prof.commands.imported import predictions_of, record_of, require_logs, subject_of
from bf16prof.commands.output import check_outputs, finished_run, hint, print_json, report_hints, write_files, write_report
from bf16prof.outcome import Outcome, of_run
from bf16prof.reconcile import check_tolerance, reconcile
from bf16prof.reports.asked import settings
from bf16prof.runs import Run, Status, save, save_losses


@takes(ImportFlags)
def import_(asked: Asked[ImportFlags]) -> None:
    """Turn what others logged of a run on GPUs into a run like one's own.

    Recognised by their content: what DeepSpeed prints (throughput, memory_breakdown,
    wall_clock_breakdown, its configuration), torch's out-of-memory messages and memory snapshots,
    what the Hugging Face Trainer prints and leaves, nvidia-smi, CSV files of step and loss, and the
    stdout of DeepSpeed's bf16 example; packed with gzip or not. With a profile, or a model, the
    estimate stands beside it.
    """
    given = asked.flags
    check_outputs(asked.given())
    tolerance = None if given.fail_over is None else o.percentage(given.fail_over)
    found = imported(asked)
    run = found.run
    for text in found.notes if given.json_ else ():  # else they are among the notes
        hint(text, given.quiet)
    write_files(given.output, [run], force=given.force, figure=given.figure, **found.more)
    if given.json_:
        print_json(run.records, **found.more)
    else:
        _show(run, given.verbose, given.quiet)
        if failure := run.manifest.cases[0].message:
            hint(f"the run did not finish: {failure}; bf16prof explain says more", False)
        report_hints(run.path, given.quiet)
    if tolerance is not None:
        check_tolerance(found.more["comparisons"], tolerance)


def imported(asked: Asked[ImportFlags]) -> Outcome:
    """What was logged as a run in a directory, with its estimate. `notes`: what was taken from the
    log."""
    from bf16prof.imports.files import read_files

    given = asked.flags
    require_logs(given.files)
    sources = read_files(given.files)
    subject = subject_of(asked, sources, given.files)
    predicted = predictions_of(subject, given.quiet)
    records = [record_of(sources, subject, predicted, given.gpu), *predicted]
    status = Status.OOM if sources.failure else Status.FINISHED
    name = subject.case.profile
    result = finished_run(name, records, subject.profile, subject.origins, status=status, message=sources.failure)
    with claimed(given.output_dir, name, force=given.force, beside=given.output or ()) as claim:
        run = dataclasses.replace(result, path=claim.path)
        claim.clear()
        save(run)
        save_losses(run)
        write_report(run)
    said = settings(subject.profile, subject.origins)
    return of_run(run, {"settings": said, "comparisons": reconcile(run.records), "run": str(run.path)}, notes=subject.told)


def _show(run: Run, verbose: bool, quiet: bool) -> None:
    from bf16prof.reports.console import answer, make_console

    answer([run], make_console(), verbose=verbose)
    for note in run.records[0].notes if not verbose else ():
        hint(note, quiet)
