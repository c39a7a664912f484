"""Asks for signatures in processes of their own, and keeps what they answer. torch-free on this side."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.cases import JobFile
from bf16prof.errors import InputError
from bf16prof.files import LARGEST_DOCUMENT, last_lines, read_text, read_up_to, write_json
from bf16prof.processes import child_environment, started
from bf16prof.signatures import store
from bf16prof.signatures.question import Question
from bf16prof.simulate.versions import check, installed

POLL_S = 0.05

OnProgress = Callable[[int, int, str], None]
"""Told how many are done, of how many, and what is running in a few words."""


@dataclass(frozen=True)
class Files:
    """The files of trace number `index`: what to trace, the signature or why there is none, how far it has come."""

    folder: Path
    index: int

    @property
    def job(self) -> Path:
        """The job."""
        return self.folder / f"job{self.index}.json"

    @property
    def signature(self) -> Path:
        """What was recorded."""
        return self.folder / f"signature{self.index}"

    @property
    def fault(self) -> Path:
        """One line."""
        return self.folder / f"fault{self.index}"

    @property
    def progress(self) -> Path:
        """A few words."""
        return self.folder / f"progress{self.index}"

    @property
    def is_over(self) -> bool:
        """Whether there is a signature or a fault."""
        return self.signature.exists() or self.fault.exists()


def answer(questions: Sequence[Question], on_progress: OnProgress = lambda done, total, words: None) -> None:
    """Trace what is missing; every question is answered or given up afterwards."""
    asked = store.missing(questions)
    if not asked:
        return
    try:
        check(installed([question.job for question in asked]))
    except InputError as error:
        for question in asked:
            store.give_up(question, error.message)
        return
    with tempfile.TemporaryDirectory(prefix="bf16prof-") as name:
        tasks = [Files(Path(name), index) for index in range(len(asked))]
        for files, question in zip(tasks, asked, strict=True):
            write_json(files.job, JobFile.of(question.job))
        log = Path(name) / "log"
        command = [sys.executable, "-m", "bf16prof.tracing.worker", name, str(len(asked))]
        with started(command, log, child_environment(), signal.SIGKILL) as process:
            _watch(process, tasks, on_progress)
        for files, question in zip(tasks, asked, strict=True):
            _take(files, question, log)


def _watch(process: subprocess.Popen[bytes], tasks: Sequence[Files], on_progress: OnProgress) -> None:
    while process.poll() is None:
        running = [files for files in tasks if not files.is_over and files.progress.exists()]
        words = [" ".join(last_lines(files.progress, 1)) for files in running]
        on_progress(sum(files.is_over for files in tasks), len(tasks), "; ".join(words) or "importing torch")
        time.sleep(POLL_S)


def _take(files: Files, question: Question, log: Path) -> None:
    if files.signature.exists():
        store.keep(question, read_up_to(LARGEST_DOCUMENT, files.signature))
    elif files.fault.exists():
        store.give_up(question, read_text(LARGEST_DOCUMENT, files.fault).strip())
    else:
        store.give_up(question, (last_lines(log, 1) or ["the process that traced it has ended without a word"])[0])
