"""Who is asking: the script and the libraries that it trains with, which must find a GPU, or
PyTorch's and DeepSpeed's own code, which must not: compiled parts of theirs would go looking for a
driver."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from bf16prof.scripts.main import is_own

INNER = frozenset({"torch", "deepspeed", "triton", "bitsandbytes", "torchao", "xformers", "functorch", "bf16prof"})
"""Packages that are told the truth."""

OF_DATA = "/data_pipeline/"
"""Where DeepSpeed looks into samples, which have values."""

OURS = str(Path(__file__).parents[2])


@functools.cache
def package_of(filename: str) -> str:
    """The installed package that a file belongs to; this one's name for its own files, empty for
    the user's and Python's."""
    if filename.startswith(OURS):
        return "bf16prof"
    parts = Path(filename).parts
    at = max((index for index, part in enumerate(parts) if part in ("site-packages", "dist-packages")), default=None)
    return "" if at is None or at + 1 >= len(parts) else parts[at + 1].removesuffix(".py")


def asked_from_inside(depth: int = 1) -> bool:
    """Whether the code that called the function that calls this one belongs to `INNER`."""
    return package_of(sys._getframe(depth + 1).f_code.co_filename) in INNER


def asked_by_deepspeed() -> bool:
    """Whether the innermost code besides PyTorch's and this package's is DeepSpeed's, and not what
    it does to a script's data."""
    frame = sys._getframe(1)
    while frame is not None and package_of(frame.f_code.co_filename) in ("torch", "bf16prof"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and package_of(frame.f_code.co_filename) == "deepspeed" and OF_DATA not in frame.f_code.co_filename


def place(depth: int = 1) -> str | None:
    """The script's own line that runs now, `train.py:12`; that of a library where none of the
    script's runs.

    `None` where the innermost code besides PyTorch's is DeepSpeed's: what that asks for is answered
    by the dry run in any case.
    """
    frame = sys._getframe(depth + 1)
    library = ""
    while frame is not None:
        filename = frame.f_code.co_filename
        package = package_of(filename)
        if not library and package == "deepspeed":
            return None
        if is_own_cached(filename):
            return f"{Path(filename).name}:{frame.f_lineno}"
        if not library and package and package not in INNER:
            library = f"{package}/{Path(filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return library or "somewhere"


is_own_cached = functools.cache(is_own)
