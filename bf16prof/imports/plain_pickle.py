"""An unpickler that can build nothing but plain data: dicts with text keys (nobody can choose their
hashes), lists, tuples, text, numbers, truth values and None.

There is no operation in it that names a class or calls anything, so a hostile file has nothing to
call; it also bounds what a file can make it hold, and does nothing recursively. The operations are
those that pickle's protocols 2 to 5 write for such data; the standard library's
`pickletools.genops` reads them.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from typing import Any

MOST_OPERATIONS = 20_000_000
"""A snapshot of 100,000 events has two to five million. Each makes at most an empty dict, so this
bounds memory and time (some 20 s)."""

_MARK = object()


class NotPlain(ValueError):
    """The pickle wants something that is no plain data."""


def load(content: bytes) -> Any:
    """The data in a pickle. Raises `ValueError` saying why it cannot be read."""
    machine = _Machine()
    with warnings.catch_warnings(action="ignore"):  # about escapes in the texts of operations that are refused anyway
        _run(machine, content)
    if len(machine.stack) != 1 or machine.stack[0] is _MARK:
        raise ValueError("it does not end with one value")
    return machine.stack[0]


def _run(machine: _Machine, content: bytes) -> None:
    for number, (code, argument, _) in enumerate(pickletools.genops(content)):
        operation = _OPERATIONS.get(code.name)
        if operation is None:
            raise NotPlain(f"it wants {code.name}{_shown(argument)}, and plain data needs no such thing")
        if number >= MOST_OPERATIONS:
            raise ValueError(f"more than {MOST_OPERATIONS:,} operations")
        try:
            operation(machine, argument)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its operation {number + 1}, {code.name}, does not fit what is there") from error


class _Machine:
    """The stack of values, and the memo of those that come again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def since_mark(self) -> list[Any]:
        """Take the values above the last mark, and the mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise IndexError
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) < count or _MARK in values:
            raise IndexError
        self.stack[-count:] = [values]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):
                raise TypeError
            target[key] = value

    def last(self, count: int) -> list[Any]:
        """Take the last values."""
        values = self.stack[-count:]
        if len(values) < count or _MARK in values:
            raise IndexError
        del self.stack[-count:]
        return values


_Operation = Callable[[_Machine, Any], None]

_OPERATIONS: dict[str, _Operation] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend(m.last(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update(m.last(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
}


def _shown(argument: Any) -> str:
    return f" {argument[:60]!r}" if isinstance(argument, str) else ""
