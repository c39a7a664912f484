"""The process that traces: imports torch once and forks for each trace, as many at a time as there are cores.

Run as `python -m bf16prof.tracing.worker FOLDER COUNT`; see `session.Files`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import traceback
from pathlib import Path

from bf16prof.cases import JobFile
from bf16prof.errors import Bf16profError
from bf16prof.files import write_bytes, write_text
from bf16prof.processes import die_with_parent
from bf16prof.runs import read
from bf16prof.tracing.session import Files


def run(files: Files) -> None:
    """One trace in this process, which must do nothing else before or after."""
    from bf16prof.tracing.trace import trace

    try:
        file: JobFile = read(files.job, JobFile)
        signature = trace(file.job(), lambda words: write_text(files.progress, words))
        write_bytes(files.signature, signature.packed())
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that waits has to hear of it
        traceback.print_exc()
        words = " ".join((error.message if isinstance(error, Bf16profError) else str(error)).split())[:300]
        write_text(files.fault, words if isinstance(error, Bf16profError) else f"{type(error).__name__}: {words}")
    sys.stderr.flush()
    os._exit(0)


def _forked(files: Files) -> None:
    die_with_parent()
    run(files)


def main() -> None:
    """All traces of the folder."""
    die_with_parent()
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    if count == 1:
        run(Files(folder, 0))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import bf16prof.tracing.trace  # noqa: F401 - what the forks will not have to import again

    context = multiprocessing.get_context("fork")
    waiting = [Files(folder, index) for index in range(count)]
    running: dict[Files, multiprocessing.process.BaseProcess] = {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            files = waiting.pop(0)
            running[files] = context.Process(target=_forked, args=(files,))
            running[files].start()
        multiprocessing.connection.wait([process.sentinel for process in running.values()])
        for files in [files for files, process in running.items() if not process.is_alive()]:
            code = running.pop(files).exitcode
            if not files.is_over:
                write_text(files.fault, f"the process that traced it has ended with exit code {code}")


if __name__ == "__main__":
    main()
