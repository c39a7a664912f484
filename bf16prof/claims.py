"""Who may write a run directory: one process at a time, into a folder that is its own.

A run directory is made with test-and-set and locked for the life of the run, by a lock that dies
with its owner. `--force` removes the files that a run has written, in the folders that the old
manifest names, and nothing else: where anything else lies among them nothing is removed at all.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.files import TEMPORARY, opened
from bf16prof.locks import Busy, held
from bf16prof.runs import LOCK, MANIFEST, OWN_FILES, REPORT, SCRIPT_FOLDER, Manifest, is_case_file, read

REPORT_HEAD = b'<meta name="generator" content="bf16prof memory report">'
"""How a report is told from anybody else's page."""


@dataclass(frozen=True)
class Claim:
    """A run directory that is this process's own, and the names of the case folders in it of the
    run that it replaces."""

    path: Path
    old_cases: tuple[str, ...] = ()

    def clear(self, keep: Container[str] = ()) -> None:
        """Remove the files of the old run, the manifest last; of one that goes on, the cases that
        are not to be kept.

        What somebody has put there meanwhile stays, and is an `InputError`.
        """
        try:
            for name in self.old_cases:
                if name not in keep:
                    _remove_folder(self.path / name)
            if keep:
                return
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == MANIFEST):
                if _is_named(entry.name, OWN_FILES.__contains__) and entry.name != LOCK:
                    entry.unlink()
        except OSError as error:
            raise InputError(f"cannot replace the run in {self.path}: {error.filename or self.path}: {error.strerror}") from error


@contextlib.contextmanager
def claimed(asked: Path | None, name: str, *, force: bool = False, beside: Sequence[Path] = ()) -> Iterator[Claim]:
    """A run directory for this process alone while the context lasts: the one asked for, or a new
    one under `runs`, named after the time.

    An existing run in it is refused, or with `force` may be cleared. `beside`: files that this
    command writes there as well. A folder that was made here and stays empty is removed again,
    unless another process holds it by then. Raises `InputError` before anything is written.
    """
    try:
        path, made = (new_folder(name), True) if asked is None else (asked, _make(asked))
    except OSError as error:
        raise InputError(f"cannot create {error.filename or asked}: {error.strerror}") from error
    try:
        if not (path / LOCK).is_file():
            _old_cases(path, force, beside)  # before a lock file is made in a folder that is none of ours
        with owned(path):
            yield Claim(path, _old_cases(path, force, beside))
    finally:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Hold the lock of an existing run directory. Raises `InputError` when another process writes
    it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(path / LOCK))
        except Busy as busy:
            raise InputError(f"{path} is being written by {busy}", hint="wait for its end, or choose another folder") from busy
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        yield


def new_folder(name: str) -> Path:
    """Make the folder of a run for which the user named none: `runs/TIME-NAME`, with a number where
    that is taken.

    The folder is made here, so that no other process, on whatever host, gets the same.
    """
    slug = re.sub(r"[^\w.-]+", "-", name)[:60].strip(".-") or "run"
    first = Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{slug}"
    first.parent.mkdir(parents=True, exist_ok=True)
    for path in itertools.chain([first], (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("there is always a next number")


def _make(path: Path) -> bool:
    """Make a folder; whether it was made here and now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
        return False
    return True


def _old_cases(path: Path, force: bool, beside: Sequence[Path]) -> tuple[str, ...]:
    """The case folders of the run that lies there, all of which may be removed. Raises `InputError`
    where that may not be."""
    try:
        entries = sorted((entry for entry in os.scandir(path) if entry.name != LOCK), key=lambda entry: entry.name)
        if not entries:
            return ()
        if not force:
            raise InputError(f"{path} exists and is not empty", hint="choose another --output-dir, or add --force to replace the run in it")
        if MANIFEST not in {entry.name for entry in entries}:
            raise InputError(f"{path} is not empty and holds no {MANIFEST}, so --force will not replace it")
        manifest: Manifest = read(path / MANIFEST, Manifest)
        cases: dict[str, int | None] = {status.case.label: status.case.world_size for status in manifest.cases}
        cases[SCRIPT_FOLDER] = None
        written = {file.name for file in beside if file.parent.resolve() == path.resolve()}
        foreign = [name for entry in entries if entry.name not in written for name in _foreign(entry, cases)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise InputError(
            f"{path} holds {foreign[0]}{more}, which the run in it has not written: nothing was removed",
            hint="move it elsewhere, or choose another --output-dir",
        )
    return tuple(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def _foreign(entry: os.DirEntry[str], cases: dict[str, int | None]) -> list[str]:
    """What no run has written, of one entry of a run directory: itself, or files in it. A label
    that is no name matches no entry."""
    if entry.is_dir(follow_symlinks=False) and entry.name in cases:
        return [
            f"{entry.name}/{inner.name}"
            for inner in sorted(os.scandir(entry.path), key=lambda inner: inner.name)
            if not (inner.is_file(follow_symlinks=False) and _is_named(inner.name, _case_files(cases[entry.name])))
        ]
    own = entry.is_file(follow_symlinks=False) and _is_named(entry.name, OWN_FILES.__contains__)
    return [] if own and (entry.name != REPORT or is_report(Path(entry.path))) else [entry.name]


def _case_files(world_size: int | None) -> Callable[[str], bool]:
    return lambda name: is_case_file(name, world_size)


def _is_named(name: str, own: Callable[[str], bool]) -> bool:
    """Whether a name is one of ours, or that of the temporary file of one, which a killed process
    leaves behind."""
    temporary = TEMPORARY.fullmatch(name)
    return own(temporary["name"] if temporary else name)


def _remove_folder(folder: Path) -> None:
    """Remove a case folder and the files in it, which have been looked at; never what is reached
    through a link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(descriptor):  # noqa: PTH208 - of the folder that was opened, whatever its name means by now
            if not _is_named(name, lambda own: is_case_file(own, None)):
                raise FileExistsError(errno.EEXIST, "was put there meanwhile", f"{folder.name}/{name}")
            os.unlink(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    folder.rmdir()


def is_report(path: Path) -> bool:
    """Whether a file is a report over runs that this program has written, as its head says."""
    try:
        with opened(path) as stream:
            return REPORT_HEAD in stream.read(2000)
    except InputError:
        return False
