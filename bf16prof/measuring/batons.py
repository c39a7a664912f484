"""A baton for torch's extensions that dies with its holder.

torch lets one process at a time build or load an extension: the one that makes a file called
`lock`; the others wait until it is gone (torch/utils/file_baton.py). A process that is killed in
between leaves the file, and everybody waits for ever. Here the system releases the baton when its
holder dies, whoever else uses the folder.
"""

from __future__ import annotations

import fcntl
import os
from typing import Any

SUFFIX = ".held"
"""Beside torch's own file, whose mere presence would be a lock to others."""


class DyingBaton:
    """What torch's `FileBaton` is, over `flock`."""

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        self._path = lock_file_path + SUFFIX
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Take the baton if nobody has it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def wait(self) -> None:
        """Wait until its holder has let go of it, or has died."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def use_dying_batons() -> None:
    """Let torch use them in this process."""
    from torch.utils import cpp_extension

    extensions: Any = cpp_extension
    extensions.FileBaton = DyingBaton
