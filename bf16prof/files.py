"""Files in and out: one bounded reader for whatever people bring, and one writer that never leaves
half a file.

Reading: a file may be missing, endless, a device, or a pipe that nobody writes to. Only regular
files are read, up to a limit; a pipe only where the caller allows it (`<(command)` in a shell), and
only while somebody writes to it.

Writing: a temporary file in the same folder, fsync, rename. A kill or a full disk leaves the old
file whole. A file that exists keeps its mode; a new one gets what the umask allows. A symbolic link
is followed: the file that it names is written, and the link stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import select
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bf16prof.documents import json_text
from bf16prof.errors import InputError

LARGEST_SETTINGS = 16 * 2**20
"""Bytes of a file of settings: a profile, a DeepSpeed JSON, a Hugging Face configuration."""
LARGEST_DOCUMENT = 512 * 2**20
"""Bytes of a document of our own. The records of a run of 100,000 steps have 60 MB."""
PATIENCE_S = 5.0
"""Seconds in which somebody has to write to a pipe, or to read from it."""
LONGEST_S = 60.0
"""Seconds in which all of a pipe has to have come."""
CHUNK = 2**20

TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.part")
"""What a temporary file of ours is called: after the file that it will be."""
NAME_SHARE = 40
"""Characters of the file's name in that of its temporary file; a character may take six bytes of
the 255 that a name may have."""

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_CANNOT_LINK = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class NotWritten(InputError):
    """A file that could not be written: the folder is read-only, the disk is full, or another file
    is in the way."""


@contextlib.contextmanager
def opened(path: Path, *, pipes: bool = False) -> Iterator[BinaryIO]:
    """Open a regular file for reading, or with `pipes` also a pipe that somebody writes to.

    Raises `InputError` naming the file; also for an `OSError` while it is read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as raw:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISFIFO(mode) and pipes:
                yield _Pipe(raw)  # type: ignore[misc] # it has `read`, which is all that is used of it
            elif stat.S_ISREG(mode):
                yield raw
            else:
                raise _unusable(mode)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a path that cannot be one
        raise InputError(f"cannot read {str(path)!r}: {error}") from error


def read_up_to(limit: int, path: Path, *, pipes: bool = False) -> bytes:
    """The content of a file of at most so many bytes. Raises `InputError` naming the file."""
    parts, size = [], 0
    with opened(path, pipes=pipes) as stream:
        while part := stream.read(min(CHUNK, limit + 1 - size)):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise InputError(f"cannot read {path}: larger than {limit >> 20} MiB")
    return b"".join(parts)


def read_text(limit: int, path: Path, *, pipes: bool = False) -> str:
    """The text of a file in UTF-8 of at most so many bytes. Raises `InputError` naming the file."""
    try:
        return read_up_to(limit, path, pipes=pipes).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: not UTF-8 text") from error


def last_lines(path: Path, count: int, limit: int = 2**16) -> list[str]:
    """The last lines of a text file that are not blank, of its last `limit` bytes; none if it
    cannot be read."""
    try:
        with opened(path) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - limit))
            text = stream.read(limit).decode(errors="replace")
    except InputError:
        return []
    return text.strip().splitlines()[-count:]


class _Pipe:
    """A pipe that is waited for only so long."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._end = time.monotonic() + LONGEST_S

    def read(self, size: int) -> bytes:
        """Some bytes; none at the end."""
        if not select.select([self._raw], [], [], PATIENCE_S)[0]:
            raise OSError(errno.EAGAIN, "nobody writes to this pipe")
        if time.monotonic() > self._end:
            raise OSError(errno.ETIMEDOUT, f"this pipe has no end after {LONGEST_S:g} s")
        return self._raw.read(size) or b""


def _unusable(mode: int) -> OSError:
    """What is wrong with a file that is none."""
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return OSError(errno.EINVAL, f"{_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def write_text(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a text file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode(), replace=replace)


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass or plain value as JSON, atomically."""
    write_text(path, json_text(value) + "\n")


def write_bytes(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file atomically. Without `replace`, a file that is there stays, even one that appears
    at the last moment.

    Raises `NotWritten` when that is so, or when the folder is read-only or the disk is full; an old
    file stays whole.
    """
    try:
        target = path.resolve() if path.is_symlink() else path
        old = _status(target)
        if old is None or stat.S_ISREG(old.st_mode):
            _write_file(target, content, old, replace)
        else:
            _write_stream(path, content, old.st_mode)
    except OSError as error:
        raise NotWritten(f"cannot write {path}: {error.strerror}") from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _write_file(target: Path, content: bytes, old: os.stat_result | None, replace: bool) -> None:
    if old is not None and not replace:
        raise FileExistsError(errno.EEXIST, "the file exists")
    if old is not None and not os.access(target, os.W_OK):  # a rename would not ask
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    temporary = target.with_name(f".{target.name[:NAME_SHARE]}.{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            if old is not None:
                _take_over(descriptor, old)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        if replace:
            temporary.replace(target)
        else:
            _publish(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _take_over(descriptor: int, old: os.stat_result) -> None:
    """Give a file the owner and the mode of the one that it will replace, as far as this user
    may."""
    with contextlib.suppress(OSError):
        if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _publish(temporary: Path, target: Path) -> None:
    """Give a file its name unless another file has it. A hard link does that at once; where there
    are none, the name is taken first."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        temporary.replace(target)


def _write_stream(path: Path, content: bytes, mode: int) -> None:
    """Write to a terminal, a null device or a pipe (`>(command)` in a shell), which a rename cannot
    replace."""
    if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        raise _unusable(mode)
    descriptor = _opened_to_write(path, time.monotonic() + PATIENCE_S)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def _opened_to_write(path: Path, deadline: float) -> int:
    """A pipe that nobody reads from cannot be opened; somebody may come."""
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
        time.sleep(0.05)
