"""Help pages print their texts as they are written: no bracketed word is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from bf16prof import app as application
from bf16prof.app import COMMANDS, front_page, make_app
from bf16prof.commands.literal import LiteralTyper


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and all below it, each with the words that call it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


app = make_app()
ALL = dict(commands(get_command(app)))


def page(app: typer.Typer, *words: str) -> str:
    """A help page without blanks, line ends and frames, which may divide any text."""
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    return re.sub(r"[\s│]", "", result.output)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_help_text_is_printed_whole(words: tuple[str, ...]) -> None:
    command = ALL[words]
    texts = [command.help, command.epilog, *(each.help for each in getattr(command, "commands", {}).values())]
    texts += [getattr(parameter, "help", None) for parameter in command.params if not getattr(parameter, "hidden", False)]
    printed = page(app, *words)

    for text in filter(None, texts):
        for bracketed in re.findall(r"\S*\[[^\]]*\]\S*", text):
            assert re.sub(r"\s", "", bracketed) in printed, text


def test_the_front_page_says_the_same_without_importing_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {level: CliRunner().invoke(make_app(), [level]).output for level in ("--help", "-h", "--help-all")}
    monkeypatch.setattr(application, "_add", lambda *_: pytest.fail("a command was imported"))

    assert all(CliRunner().invoke(front_page([level]), [level]).output == output for level, output in whole.items())
    assert all(name in whole["--help"] for name in COMMANDS)


def test_the_profile_has_a_deepspeed_table() -> None:
    assert "insteadoftheprofile's[deepspeed]." in page(app, "estimate")


def test_brackets_are_no_markup_anywhere() -> None:
    app = LiteralTyper(epilog="See [bold]this[/bold] [1].")

    @app.command(epilog="Ends with [/red].")
    def first(file: Annotated[str, typer.Option(help="Sets [workload] and [deepspeed.zero_optimization].")] = "") -> None:
        """Reads [model], `[x, y]` and [@click]."""

    @app.command()
    def second() -> None:
        """Another, of [b]."""

    for _ in range(2):
        assert "See[bold]this[/bold][1]." in page(app)
        assert "Another,of[b]." in page(app)
        printed = page(app, "first")
        for text in ("[workload]and[deepspeed.zero_optimization].", "[model],`[x,y]`and[@click].", "Endswith[/red]."):
            assert text in printed
