"""Locks that die with their owner: `flock` on a file, which the system releases when the process
ends, however it ends.

They hold between hosts as far as the file system passes `flock` on. Where it knows none at all, the
file itself is the lock: made by one process only, and left behind if that is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What `flock` says where the file system knows none."""
GLANCE_S = 0.3
"""Whoever only looks whether a lock is held holds it for some microseconds; that is waited for."""


class Busy(Exception):
    """Another process holds the lock; the text says which, as far as it has said so."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock at this path while the context lasts; the file is gone afterwards.

    Raises `Busy` at once when another process holds it, and `OSError` where the file cannot be
    made.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is released: whoever gets a file that has lost its name tries again
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock at this path, as far as this process may look."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EPERM)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """The open lock file, locked, and still the one that the path names."""
    deadline = time.monotonic() + GLANCE_S
    while True:
        descriptor, made = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, *NO_FLOCK):
                os.close(descriptor)
                raise
            if error.errno in NO_FLOCK and made:
                return _sign(descriptor)
            os.close(descriptor)
            if error.errno in NO_FLOCK or time.monotonic() > deadline:
                raise Busy(owner or "another process") from error
            time.sleep(0.02)
            continue
        if _names(path, descriptor):
            return _sign(descriptor)
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """The lock file, and whether this call has made it."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file")
    return descriptor, False


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> int:
    """Say in the file who holds it, for whoever is refused. A full disk does not matter."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor
