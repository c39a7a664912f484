"""Runs a script in this process as `python` would: as `__main__`, with its own `sys.argv` and
`sys.path[0]`, in the current folder."""

from __future__ import annotations

import importlib.machinery
import io
import os
import runpy
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

from bf16prof.scripts.command import Script


class SeenEnough(BaseException):
    """Enough has been seen of the script. It passes through `except Exception`, as
    `KeyboardInterrupt` does."""


@dataclass(frozen=True)
class Ending:
    """How a script ended: the exit code that python would leave with, and in words what there is to
    say of it.

    `finished`: it was stopped by `Finished`, as it was meant to be. `error`: what it raised.
    """

    code: int
    message: str = ""
    finished: bool = False
    error: BaseException | None = None


def run(script: Script) -> Ending:
    """Run it to its end, and say how it ended. What it raises is printed as python would;
    `KeyboardInterrupt` passes."""
    try:
        _run_as_main(script)
    except SeenEnough:
        return Ending(0, finished=True)
    except SystemExit as left:
        return _left(left)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a script may raise
        return raised(error)
    return Ending(0)


def raised(error: BaseException) -> Ending:
    """The ending of a script that raised: its traceback is printed without the frames of whoever
    runs it."""
    kept = own_traceback(error)
    traceback.print_exception(type(error), error, kept)
    said = " ".join(str(error).split())
    place = _place(error, kept)
    return Ending(1, f"raised {type(error).__name__}{f': {said}' if said else ''}{f' ({place})' if place else ''}", error=error)


def own_traceback(error: BaseException) -> types.TracebackType | None:
    """The traceback from the script's first frame on."""
    kept = error.__traceback__
    while kept is not None and _is_outside(kept.tb_frame.f_code.co_filename):
        kept = kept.tb_next
    return kept or error.__traceback__


def _is_outside(filename: str) -> bool:
    return filename in (__file__, runpy.__file__) or filename.startswith("<frozen")


def _place(error: BaseException, kept: types.TracebackType | None) -> str:
    """The innermost line of the script's own code that the error passed: neither an installed
    package's nor the library's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(kept)
    own = [frame for frame in frames if is_own(frame.filename)] or frames[-1:]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def is_own(filename: str) -> bool:
    """Whether a file is the user's: not installed, not Python's, not made up, and not of this
    package."""
    if filename.startswith("<"):
        return False
    parts = Path(filename).parts
    package = str(Path(__file__).parents[1])
    return not {"site-packages", "dist-packages"} & set(parts) and not filename.startswith((os.path.dirname(os.__file__), package))  # noqa: PTH120


def _left(left: SystemExit) -> Ending:
    """The ending of a script that called `sys.exit`, as python understands its argument."""
    if left.code is None or isinstance(left.code, int):
        code = (left.code or 0) & 0xFF
        return Ending(code, f"left with exit code {code}" if code else "")
    sys.stderr.write(f"{left.code}\n")
    return Ending(1, f"left with: {' '.join(str(left.code).split())}")


def _run_as_main(script: Script) -> None:
    here = str(Path.cwd())
    if script.module:
        _put_first(here)
        sys.argv = [script.module, *script.arguments]
        runpy.run_module(script.module, run_name="__main__", alter_sys=True)
        return
    path = Path(script.path).resolve()
    sys.argv = [script.path, *script.arguments]
    _put_first(str(path.parent))
    main = types.ModuleType("__main__")
    main.__file__ = os.path.abspath(script.path)  # noqa: PTH100 - as python does: links are not followed
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", main.__file__)
    main.__dict__["__builtins__"] = __builtins__
    with io.open_code(str(path)) as file:
        code = compile(file.read(), main.__file__, "exec", dont_inherit=True)
    sys.modules["__main__"] = main  # and it stays, as what the script leaves behind may still use it
    exec(code, main.__dict__)


def _put_first(folder: str) -> None:
    """Let modules be found beside the script first, and no more where this process was started
    (`python -m` puts that folder first)."""
    ours = str(Path(__file__).parents[2])
    if sys.path and sys.path[0] in ("", str(Path.cwd())):
        del sys.path[0]
        if ours == str(Path.cwd()) and ours not in sys.path:
            sys.path.append(ours)  # this package was found there, and is not done with being imported
    sys.path.insert(0, folder)
