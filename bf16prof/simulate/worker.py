"""The process that dry-runs jobs: imports torch and DeepSpeed once, then forks for every job, as many at a time as there are cores.

Run as `python -m bf16prof.simulate.worker FOLDER COUNT`; reads `jobN.json` and writes `recordN.json` (see `runner.py`).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
from pathlib import Path

from bf16prof.cases import JobFile
from bf16prof.processes import die_with_parent
from bf16prof.records import document
from bf16prof.runs import read, write_json
from bf16prof.simulate.runner import job_file, record_file


def run_job(folder: Path, index: int) -> None:
    """One job in this process, which must do nothing else before or after."""
    from bf16prof.simulate.dryrun import dry_run

    task: JobFile = read(job_file(folder, index), JobFile)
    write_json(record_file(folder, index), document([dry_run(task.job())]))
    os._exit(0)


def _job_process(folder: Path, index: int) -> None:
    die_with_parent()
    run_job(folder, index)


def main() -> None:
    """Run all jobs of the folder."""
    die_with_parent()
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    if count == 1:
        run_job(folder, 0)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import bf16prof.simulate.dryrun  # noqa: F401 - what the forks will not have to import again

    context = multiprocessing.get_context("fork")
    waiting = [context.Process(target=_job_process, args=(folder, index)) for index in range(count)]
    running: list[multiprocessing.process.BaseProcess] = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            running.append(waiting.pop(0))
            running[-1].start()
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]


if __name__ == "__main__":
    main()
