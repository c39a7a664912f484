"""Asks for signatures in processes of their own, and keeps what they answer. torch-free on this
side."""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.cases import JobFile
from bf16prof.dry_run.versions import check, installed
from bf16prof.errors import InputError
from bf16prof.files import LARGEST_DOCUMENT, last_lines, read_text, read_up_to, write_json
from bf16prof.processes import child_environment, started
from bf16prof.scratch import temporary_folder
from bf16prof.signatures import store
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.signatures.signature import Signature
from bf16prof.signatures.sources import ReadSources

POLL_S = 0.05

OnProgress = Callable[[int, int, str], None]
"""Told how many are done, of how many, and what is running in a few words."""


@dataclass(frozen=True)
class TraceFiles:
    """The files of trace number `index`: what to trace, the signature or why there is none, how far
    it has come."""

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
    def reads(self) -> Path:
        """Which files and variables were read for it, of a function of the user's own."""
        return self.folder / f"reads{self.index}"

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


class Session:
    """A process that has imported torch and traces whatever it is asked; started by the first
    inquiry, ended with this one."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._asked = 0

    def answer(self, inquiries: Sequence[Inquiry], on_progress: OnProgress = lambda done, total, words: None) -> None:
        """Trace what is missing; every inquiry is answered or given up afterwards."""
        asked = store.missing(inquiries)
        try:
            check(installed([inquiry.job for inquiry in asked]))
        except InputError as error:
            for inquiry in asked:
                store.give_up(inquiry, error.message)
            return
        for files, inquiry in zip(self._traced(asked, on_progress), asked, strict=True):
            self._take(files, inquiry)

    def record(self, inquiries: Sequence[Inquiry], on_progress: OnProgress = lambda done, total, words: None) -> dict[str, Signature]:
        """Trace all of these, and keep none: the answers by digest, without those that failed; none
        with releases that are refused."""
        try:
            check(installed([inquiry.job for inquiry in inquiries]))
        except InputError:
            return {}
        files = self._traced(inquiries, on_progress)
        answers = ((inquiry, each.signature) for inquiry, each in zip(inquiries, files, strict=True) if each.signature.exists())
        return {inquiry.digest: Signature.unpacked(read_up_to(LARGEST_DOCUMENT, path)) for inquiry, path in answers}

    def _traced(self, asked: Sequence[Inquiry], on_progress: OnProgress) -> list[TraceFiles]:
        if not asked:
            return []
        process = self._running()
        tasks = [TraceFiles(self._folder, self._asked + index) for index in range(len(asked))]
        self._asked += len(asked)
        for files, inquiry in zip(tasks, asked, strict=True):
            write_json(files.job, JobFile.of(inquiry.job))
        _watch(process, tasks, on_progress)
        return tasks

    def close(self) -> None:
        """End the process."""
        self._process = None
        self._stack.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._folder = self._stack.enter_context(temporary_folder())
            command = [sys.executable, "-m", "bf16prof.tracing.worker", str(self._folder)]
            self._process = self._stack.enter_context(started(command, self._log, child_environment(self._folder), signal.SIGKILL))
            atexit.register(self.close)
        return self._process

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _take(self, files: TraceFiles, inquiry: Inquiry) -> None:
        if files.signature.exists():
            content = read_up_to(LARGEST_DOCUMENT, files.signature)
            store.keep(inquiry, content, _sources(files.reads, content) if files.reads.exists() else None)
        elif files.fault.exists():
            store.give_up(inquiry, read_text(LARGEST_DOCUMENT, files.fault).strip())
        else:
            store.give_up(inquiry, (last_lines(self._log, 1) or ["the process that traced it has ended without a word"])[0])


def _sources(reads: Path, answer: bytes) -> bytes:
    """As they are here: what the process that traced has in its environment besides is ours."""
    files, variables = json.loads(read_up_to(LARGEST_DOCUMENT, reads))
    return ReadSources.of(files, variables, answer).packed()


def _watch(process: subprocess.Popen[bytes], tasks: Sequence[TraceFiles], on_progress: OnProgress) -> None:
    while process.poll() is None and not all(files.is_over for files in tasks):
        running = [files for files in tasks if not files.is_over and files.progress.exists()]
        words = [" ".join(last_lines(files.progress, 1)) for files in running]
        on_progress(sum(files.is_over for files in tasks), len(tasks), "; ".join(words) or "importing torch")
        time.sleep(POLL_S)
