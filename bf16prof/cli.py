"""The program: one way in and one way out, errors and signals mapped to exit codes in one place.

Exit codes: 0 ok, 1 internal error, 2 bad input, 3 the run failed, 4 an answer that was not to be
accepted; interrupted: 130 by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP. Nothing is imported here that
takes time, so that a signal finds its handler from the first instruction on.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from bf16prof.errors import SIGNALLED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIDYING_S = 10.0
"""Seconds after a signal in which no other interrupts: ranks are ended, and the run is saved."""


def main() -> NoReturn:
    """Run the program; every way out of it passes here."""
    signals = _Signals()
    atexit.register(signals.ignore)  # the first that is registered is the last that runs
    _fill_closed_streams()
    try:
        code = _run()
    except KeyboardInterrupt:
        code = SIGNALLED + (signals.caught or signal.SIGINT)
    except Exception:
        if not signals.caught:
            raise
        code = SIGNALLED + signals.caught  # what a KeyboardInterrupt has become: of one in `__set_name__` Python makes a RuntimeError
    if signals.caught or code == SIGNALLED + signal.SIGINT:  # typer, or whoever, has caught the KeyboardInterrupt and says nothing
        sys.stderr.write("bf16prof: interrupted\n")
        code = SIGNALLED + (signals.caught or signal.SIGINT)
    signals.leave_at_once()
    if signals.caught:
        # Python remembers a KeyboardInterrupt that left an `exec` (dataclasses have one) and ends
        # itself by SIGINT, whoever has caught it.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                continue
        os._exit(code)
    sys.exit(code)


class _Signals:
    """Turns the first signal into a KeyboardInterrupt, whatever the program does; one that was
    ignored from the start stays so."""

    def __init__(self) -> None:
        self.caught: int = 0
        self._at = 0.0
        self._handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self._handled:
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.caught and now - self._at < TIDYING_S:
            return
        self.caught, self._at = number, now
        raise KeyboardInterrupt

    def leave_at_once(self) -> None:
        """Nothing is left to be tidied: what was to be written is written."""
        for number in self._handled:
            signal.signal(number, lambda number, _frame: os._exit(SIGNALLED + number))

    def ignore(self) -> None:
        """The exit code is decided. What remains of Python's own end would give signals their
        default back, which kills (`-2`)."""
        for number in self._handled:
            signal.signal(number, signal.SIG_IGN)


def _fill_closed_streams() -> None:
    """Give each standard stream that was closed before the start something to be, else a file that
    is opened later takes its number, and what is printed lands in it. Reading finds the end,
    messages are dropped; what is written to stdout fails, as on a full disk."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode))


def _run() -> int:
    import gc

    gc.disable()  # nearly all that is made here lives to the end: looking for garbage takes a fifth of the time and finds none
    import typer

    from bf16prof.app import front_page
    from bf16prof.errors import Bf16profError, InputError
    from bf16prof.scripts.dashes import split

    try:
        _require_working_directory()
        own, words = split(sys.argv[1:])
        script = [] if words is None else ["--", *words]
        code = front_page(own)(args=[*map(_dashes, own), *script], standalone_mode=False)
        sys.stdout.flush()
    except Bf16profError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except typer.exceptions.TyperException as error:
        return _fail(error.format_message(), "", error.exit_code)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except OSError as error:
        if isinstance(error.filename, str | bytes) and error.errno in _OF_A_PATH:
            return _fail(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}", "", InputError.exit_code)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it would fail again on the way out
        return _fail(f"cannot write the output: {error.strerror}", "", InputError.exit_code)
    return code if isinstance(code, int) else 0


_OF_A_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    errno.ENOSPC, errno.EDQUOT, errno.EIO,
)  # fmt: skip
"""What is wrong with a path that the user, another user or the machine has made so. To look whether
it exists is enough for some."""


def _require_working_directory() -> None:
    """Raise `InputError` where it has been removed: nothing finds its way from there."""
    from bf16prof.errors import InputError

    try:
        os.getcwd()  # noqa: PTH109 - pathlib takes time to import
    except OSError as error:
        raise InputError(f"the working directory is gone: {error.strerror}", hint="change to a folder that exists") from error


def _fail(message: str, hint: str, code: int) -> int:
    from bf16prof.reports.units import inert

    if message:  # there is none where the help page was the answer
        sys.stderr.write(f"bf16prof: {inert(message, None)}\n")
    if hint:
        sys.stderr.write(f"  hint: {inert(hint, None)}\n")
    return code


def _dashes(argument: str) -> str:
    """`--num_gpus=2` as `--num-gpus=2`: people type both."""
    if not argument.startswith("--"):
        return argument
    flag, sign, value = argument.partition("=")
    return flag.replace("_", "-") + sign + value


if __name__ == "__main__":
    main()
