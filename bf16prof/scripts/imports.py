"""Changes in libraries that a script has not imported yet: made as soon as it does."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are to be changed as Python would, and changes each when it has been
    run."""

    def __init__(self, changes: Mapping[str, Change]) -> None:
        self._changes = changes
        self._asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec, whose loader changes it in the end."""
        if fullname not in self._changes or fullname in self._asking:
            return None
        self._asking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        run, change = spec.loader.exec_module, self._changes[fullname]

        def exec_module(module: ModuleType) -> None:
            run(module)
            change(module)

        loader: Any = spec.loader
        loader.exec_module = exec_module
        return spec


@contextlib.contextmanager
def changed_when_imported(changes: Mapping[str, Change]) -> Iterator[None]:
    """Make the changes, by module, now where it has been imported and else when it is."""
    finder = _Finder(changes)
    for name in changes.keys() & sys.modules.keys():
        changes[name](sys.modules[name])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
