"""The process that traces: imports torch once and forks for each trace, as many at a time as there
are cores.

Run as `python -m bf16prof.tracing.worker FOLDER`; jobs appear there, by number, and are answered
beside it (`session.TraceFiles`).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bf16prof.cases import JobFile
from bf16prof.dry_run.worker import import_first
from bf16prof.errors import Bf16profError
from bf16prof.files import write_bytes, write_json, write_text
from bf16prof.processes import die_with_parent
from bf16prof.profiles.models import FactorySettings
from bf16prof.runs import read
from bf16prof.tracing.reads import Reads
from bf16prof.tracing.session import POLL_S, TraceFiles


def run(files: TraceFiles) -> None:
    """One trace in this process, which must do nothing else before or after."""
    from bf16prof.tracing.trace import trace

    try:
        file: JobFile = read(files.job, JobFile)
        job = file.job()
        reads = Reads() if isinstance(job.profile.model, FactorySettings) else None
        content = trace(job, lambda words: write_text(files.progress, words)).packed()
        if reads is not None:
            write_json(files.reads, [list(reads.files(besides=str(files.folder))), reads.variables()])
        write_bytes(files.signature, content)
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that waits has to hear of it
        traceback.print_exc()
        words = " ".join((error.message if isinstance(error, Bf16profError) else str(error)).split())[:300]
        write_text(files.fault, words if isinstance(error, Bf16profError) else f"{type(error).__name__}: {words}")
    sys.stderr.flush()
    os._exit(0)


def _model(files: TraceFiles) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read(files.job, JobFile).profile.get("model", {})
        return found
    except Bf16profError:  # its fork says what is wrong with it
        return {}


def _forked(files: TraceFiles) -> None:
    die_with_parent()
    run(files)


def main() -> None:
    """All traces that are asked for, until whoever asks is gone."""
    die_with_parent()
    folder = Path(sys.argv[1])
    os.environ["DS_ACCELERATOR"] = "cpu"
    import bf16prof.tracing.trace  # noqa: F401 - what the forks will not have to import again

    context = multiprocessing.get_context("fork")
    following = 0
    running: dict[TraceFiles, multiprocessing.process.BaseProcess] = {}
    while True:
        while len(running) < (os.cpu_count() or 1) and (files := TraceFiles(folder, following)).job.exists():
            following += 1
            import_first([_model(files)])
            running[files] = context.Process(target=_forked, args=(files,))
            running[files].start()
        multiprocessing.connection.wait([process.sentinel for process in running.values()], POLL_S)
        for files in [files for files, process in running.items() if not process.is_alive()]:
            code = running.pop(files).exitcode
            if not files.is_over:
                write_text(files.fault, f"the process that traced it has ended with exit code {code}")
        if not running:
            time.sleep(POLL_S)


if __name__ == "__main__":
    main()
