"""A Typer with help pages of our own (`help.py`): texts are printed as they are written, and `-h`
is shorter than `--help`.

Typer's pages read texts as markup of rich, in which `[deepspeed]` is a style and vanishes, and cut
the names of flags at 80 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from bf16prof.commands.help import NAMES, help_page, level_of
from bf16prof.scripts.dashes import split

_LEVEL = "bf16prof.help"
SCRIPT = "bf16prof.script"
"""Where a context keeps what stands after `--`."""


class LiteralCommand(TyperCommand):
    """A command with such a page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep which page is asked for, then parse."""
        ctx.meta[_LEVEL] = level_of(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(help_page(self, ctx, ctx.meta.get(_LEVEL, "full")))


class ScriptCommand(LiteralCommand):
    """A command that takes a training script and its arguments after `--`, which are nobody's
    flags."""

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
    """A group of commands with such pages."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep which page is asked for, then parse."""
        ctx.meta[_LEVEL] = level_of(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page, which lists the commands with theirs."""
        formatter.write(help_page(self, ctx, ctx.meta.get(_LEVEL, "full")))


class LiteralTyper(typer.Typer):
    """A Typer of such commands."""

    def __init__(self, **settings: Any) -> None:
        context = {"help_option_names": NAMES, **settings.pop("context_settings", {})}
        super().__init__(cls=LiteralGroup, context_settings=context, **settings)

    def command(self, name: str | None = None, *, takes_script: bool = False, **settings: Any) -> Callable[[Any], Any]:
        """Register a command."""
        context = {"help_option_names": NAMES, **settings.pop("context_settings", {})}
        kind = ScriptCommand if takes_script else LiteralCommand
        return super().command(name, cls=kind, context_settings=context, **settings)
