"""A dry run in this process with nothing left out, whose record is written to a file; the process
ends with it.

What is not to be left out has a name. `answers`: no answer is remembered. `ranks`: DeepSpeed's own
loops over all ranks run. `steps`: all steps are run, none is repeated. `micro-steps`: nor is any of
these.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def trace(task: Path, what: str, out: Path) -> None:
    """Run the task and write its record; what is printed meanwhile goes to a log beside it."""
    descriptor = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    from bf16prof.documents import document
    from bf16prof.dry_run import dryrun, memo, micro_steps, ranks, recording
    from bf16prof.dry_run.task import Task
    from bf16prof.files import write_json
    from bf16prof.runs import read

    names = what.split(",")
    if "answers" in names:
        memo.Memo.question = lambda *_: None  # type: ignore[method-assign]
    if "ranks" in names:
        ranks.KNOWN.update({key: set() for key in ranks.KNOWN})
    if "steps" in names:
        recording.MOST_REPEATS = 0
    if "micro-steps" in names:
        micro_steps.MicroSteps.body = lambda *_: None  # type: ignore[method-assign]
    record, _ = dryrun.dry_run(read(task, Task))
    write_json(out, document([record]))
    os._exit(0)
