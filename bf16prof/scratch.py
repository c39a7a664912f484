"""Temporary folders: one is gone when its process is done with it, and where that was killed, when
the next one makes its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bf16prof.errors import InputError
from bf16prof.locks import held, is_held

PREFIX = "bf16prof-"
LOCK = "lock"
"""Held by the process that uses the folder: a folder whose lock nobody holds is nobody's any
more."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of our own that is gone afterwards. Raises `InputError` where no place for temporary
    files can be written."""
    import shutil
    import tempfile

    try:
        place = Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=place))
        final = folder.with_name(folder.name[1:])
    except OSError as error:
        raise InputError(f"cannot write temporary files: {error.strerror}", hint="set TMPDIR to a folder that can be written") from error
    remove_abandoned(place)
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a disk that is full says so when it matters
                stack.enter_context(held(folder / LOCK))
            folder = folder.rename(final)  # only now can others see it, and that it is held
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(place: Path) -> None:
    """Remove this user's folders there whose processes were killed. What another user has made, or
    holds, stays."""
    import shutil

    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            is_ours = folder.lstat().st_uid == os.geteuid() and folder.is_dir() and not folder.is_symlink()
            if is_ours and (folder / LOCK).is_file() and not is_held(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)
