"""A Typer whose help texts are printed as they are written.

Typer reads help texts as markup of rich, in which `[deepspeed]` is a style and vanishes. Nothing here is meant as markup, so brackets are
escaped, once for all commands, when a help page is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from bf16prof.scripts.command import split

SCRIPT = "bf16prof.script"
"""Where a context keeps what stands after `--`."""


class LiteralCommand(TyperCommand):
    """A command whose help page has no markup."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page."""
        make_literal(self)
        super().format_help(ctx, formatter)


class ScriptCommand(LiteralCommand):
    """A command that takes a training script and its arguments after `--`, which are nobody's flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the command's own arguments; what stands after `--` is kept for `script_words`."""
        own, words = split(args)
        ctx.meta[SCRIPT] = words
        return super().parse_args(ctx, own)


def script_words(context: typer.Context) -> list[str] | None:
    """What stands after `--` on the command line; `None` where there is no `--`."""
    words: list[str] | None = context.meta.get(SCRIPT)
    return words


class LiteralGroup(TyperGroup):
    """A group of commands whose help pages have no markup."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page, which lists the commands with theirs."""
        make_literal(self)
        for command in self.commands.values():
            make_literal(command)
        super().format_help(ctx, formatter)


class LiteralTyper(typer.Typer):
    """A Typer of such commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=LiteralGroup, **settings)

    def command(self, name: str | None = None, *, takes_script: bool = False, **settings: Any) -> Callable[[Any], Any]:
        """Register a command."""
        return super().command(name, cls=ScriptCommand if takes_script else LiteralCommand, **settings)


def make_literal(command: Any) -> None:
    """Escape the brackets in all texts of a command's help page, unless that has been done."""
    from rich.markup import escape

    if getattr(command, "is_literal", False):
        return
    command.is_literal = True
    for part, names in ((command, ("help", "short_help", "epilog")), *((each, ("help",)) for each in command.params)):
        for name in names:
            if text := getattr(part, name, None):
                setattr(part, name, escape(text))
