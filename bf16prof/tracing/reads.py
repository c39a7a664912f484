"""Sees what a process reads: files, by Python's audit hook, and variables of the environment. For a
process that ends soon: it stays."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

NOT_FILES = ("/proc/", "/sys/", "/dev/")


class Reads:
    """Everything that is read from now on, each once."""

    def __init__(self) -> None:
        self._paths: dict[str, None] = {}
        self._variables: dict[str, None] = {}
        sys.addaudithook(self._hear)
        environment: Any = type(os.environ)
        lookup = environment.__getitem__

        def seen(variables: Any, name: str) -> str:
            self._variables[name] = None
            found: str = lookup(variables, name)
            return found

        environment.__getitem__ = seen

    def files(self, besides: str) -> Iterator[str]:
        """The files that were read, those below the folder `besides` left out; of compiled ones the
        source as well."""
        for path in list(self._paths):
            if path.startswith((*NOT_FILES, besides)):
                continue
            if path.endswith(".pyc") and "__pycache__" in path:
                yield importlib.util.source_from_cache(path)
            else:
                yield path

    def variables(self) -> list[str]:
        """The variables that were asked for."""
        return list(self._variables)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path, mode, flags = arguments
        is_read = flags & os.O_ACCMODE == os.O_RDONLY if mode is None else "r" in mode and "+" not in mode
        if is_read:
            self._paths[os.path.abspath(os.fsdecode(path))] = None  # noqa: PTH100 - pathlib would look links up
