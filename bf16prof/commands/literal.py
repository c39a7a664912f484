"""A Typer with help pages of our own (`help.py`): texts are printed as they are written, and `-h` is shorter than `--help`.

Typer's pages read texts as markup of rich, in which `[deepspeed]` is a style and vanishes, and cut the names of flags at 80 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from bf16prof.commands.help import NAMES, help_page, level_of

_LEVEL = "bf16prof.help"


class LiteralCommand(TyperCommand):
    """A command with such a page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep which page is asked for, then parse."""
        ctx.meta[_LEVEL] = level_of(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        formatter.write(help_page(self, ctx, ctx.meta.get(_LEVEL, "full")))


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

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command."""
        context = {"help_option_names": NAMES, **settings.pop("context_settings", {})}
        return super().command(name, cls=LiteralCommand, context_settings=context, **settings)
