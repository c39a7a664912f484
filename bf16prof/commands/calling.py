"""Functions of the Python API with the parameters of a command: `called` gives them what
`flags.takes` gives typer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

from bf16prof.commands.flags import COMMANDLINE, DEFAULT, Asked, WorkloadFlags, hints_of, one_call, parameters_of
from bf16prof.errors import InputError
from bf16prof.vocabulary import Device, Offload

P = ParamSpec("P")
F = TypeVar("F", bound=WorkloadFlags)
R = TypeVar("R")

OF_THE_TERMINAL = ("json_", "output", "figure", "force", "verbose", "fail_unless_fits", "fail_over", "write")
"""What only a command does with its answer: in Python the outcome is there to be written and
asked."""


SCRIPT = "script"
"""The parameter that stands for what a terminal has after `--`."""

_DEFAULTS: dict[str, Any] = {"quiet": True}
"""What is otherwise in Python where a caller says nothing."""


def called(flags: Callable[P, F]) -> Callable[[Callable[[Asked[F]], R]], Callable[P, R]]:
    """Give a function of the Python API the fields of `flags` as parameters.

    Numbers and lists stand for their text: `gpus=8` is `gpus="8"`, `zero=[1, 2]` is `zero="1,2"`.
    Environment variables are not read, nothing is printed unless `quiet=False`, and nothing is
    written: what is returned can be saved.
    """

    def decorate(function: Callable[[Asked[F]], R]) -> Callable[P, R]:
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            known = {each.name: each for each in dataclasses.fields(flags) if each.name not in OF_THE_TERMINAL}  # type: ignore[arg-type]
            first = [name for name, each in known.items() if not each.kw_only]
            if len(args) > len(first):
                raise InputError(f"{function.__name__}: {len(args)} positional arguments; it takes {len(first)}: {', '.join(first)}")
            named: dict[str, Any] = {**dict(zip(first, args, strict=False)), **kwargs}
            hints = hints_of(flags)  # type: ignore[arg-type]
            spelt = {text: name for name in known for text in _spellings(hints[name])}
            meant = [spelt.get(name, name) for name in named]
            if twice := [name for name in known if meant.count(name) > 1]:
                raise InputError(f"{function.__name__}: {', '.join(twice)} is said twice")
            named = dict(zip(meant, named.values(), strict=True))
            if unknown := [name for name in named if name not in known]:
                raise InputError(f"{function.__name__}: no argument {', '.join(unknown)}", hint=f"known: {', '.join(known)}")
            values = {name: _typed(value, hints[name]) for name, value in named.items()}
            values = _DEFAULTS | values
            sources = {name: COMMANDLINE if name in named else DEFAULT for name in known if name != SCRIPT}
            script = values.get(SCRIPT)
            words = None if script is None else [*map(str, script)]
            with one_call():
                return function(Asked(function.__name__, flags(**values), sources, words))  # type: ignore[call-arg]

        own = [each for each in parameters_of(flags, hints_of(flags)) if each.name not in OF_THE_TERMINAL]  # type: ignore[arg-type]
        plain = [each.replace(annotation=each.annotation.__origin__, default=_DEFAULTS.get(each.name, each.default)) for each in own]
        returned = get_type_hints(function).get("return")
        run.__signature__ = inspect.Signature(plain, return_annotation=returned)  # type: ignore[attr-defined]
        meanings = [f":param {each.name}: {each.annotation.__metadata__[0].help}" for each in own]
        run.__doc__ = "\n".join([inspect.getdoc(function) or "", "", *meanings])
        run.__module__ = function.__module__
        run.__name__ = run.__qualname__ = function.__name__
        return run

    return decorate


def _spellings(hint: Any) -> list[str]:
    """The names of a flag as a terminal has them, as names of Python: `seq` of `--seq`, which is
    short for `--sequence-length`."""
    declared = [text for option in hint.__metadata__ for text in (option.default, *(option.param_decls or ())) if isinstance(text, str)]
    return [text.removeprefix("--").replace("-", "_") for text in declared if text.startswith("--") and "/" not in text]


def _typed(value: Any, hint: Any) -> Any:
    """A value of Python as the flag's type: text for numbers and lists, paths for text, members for
    the names of choices."""
    kinds = _kinds(hint)
    if str in kinds and not isinstance(value, str) and value is not None and list not in kinds:
        return ",".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, Path) else str(value)
    if list in kinds and isinstance(value, str | Path):
        return [Path(value)] if Path in kinds else [str(value)]
    if list in kinds and value is not None:
        return [Path(item) if Path in kinds else item for item in value]
    for kind in (Device, Offload):
        if kind in kinds and isinstance(value, str):
            return _member(kind, value)
    return Path(value) if Path in kinds and isinstance(value, str) else value


def _member(kind: type[StrEnum], value: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise InputError(f"{value!r}: expected one of {', '.join(str(member) for member in kind)}") from error


def _kinds(hint: Any) -> set[Any]:
    """The plain types in an annotation: `Annotated[list[Path] | None, ...]` has list and Path."""
    parts = getattr(hint, "__args__", ())
    origin = getattr(hint, "__origin__", None)
    own = {origin} if origin in (list,) else {hint} if isinstance(hint, type) else set()
    inner = parts if not hasattr(hint, "__metadata__") else (origin,)
    return own.union(*(_kinds(part) for part in inner)) if inner else own
