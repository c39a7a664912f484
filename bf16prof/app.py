"""The Typer application: its commands, each imported when it is needed. Importing them all takes as
long as an estimate."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bf16prof import __version__
from bf16prof.commands.help import EXIT_CODES, examples
from bf16prof.commands.literal import LiteralTyper


@dataclass(frozen=True)
class CommandAt:
    """A command, or a group of them: the module of `commands` that has it, its name there, and
    examples."""

    module: str
    attribute: str
    examples: tuple[str, ...]
    takes_script: bool = False
    is_group: bool = False


COMMANDS = {
    "estimate": CommandAt(
        "estimate",
        "estimate",
        (
            "bf16prof estimate llama3.1-8b --gpus 8,16 --gpu h100",
            "bf16prof estimate deepspeed-bf16-example --zero 3 --gpus 4 --recipe bf16-full --json",
        ),
    ),
    "measure": CommandAt(
        "measure",
        "measure",
        (
            "bf16prof measure my.toml --zero 3 --recipe bf16-full --num-gpus 8 --fail-over 1%",
            "bf16prof measure --num-gpus 8 -- train.py --deepspeed --deepspeed_config ds.json",
        ),
        takes_script=True,
    ),
    "simulate": CommandAt(
        "simulate",
        "simulate",
        (
            "bf16prof simulate deepspeed-bf16-example --zero 3 --gpus 4",
            "bf16prof simulate --gpus 8 --gpu h100 -- train.py --deepspeed --deepspeed_config ds.json",
        ),
        takes_script=True,
    ),
    "plan": CommandAt(
        "plan",
        "plan",
        (
            "bf16prof plan llama3.1-8b --gpu h100 --gpus 8",
            "bf16prof plan gpt2-xl --gpu rtx-4090 --gpus 2 --margin 15% --write ds.json",
        ),
    ),
    "import": CommandAt(
        "importing",
        "import_",
        (
            "bf16prof import train.log loss.csv nvidia-smi.csv -p deepspeed-bf16-example --ds-config baseline.json --gpus 4",
            "bf16prof import snapshot.pickle --hf-config config.json --zero 3 --gpus 8 --recipe bf16-full --fail-over 1%",
        ),
    ),
    "explain": CommandAt(
        "explain",
        "explain",
        (
            "bf16prof explain train.log",
            "bf16prof explain train.log --hf-config config.json --ds-config ds.json --gpus 8",
            "... 2>&1 | bf16prof explain -",
        ),
    ),
    "report": CommandAt(
        "report",
        "report",
        ("bf16prof report runs/20260101-120000-cpu-demo --open", "bf16prof report published:deepspeed-bf16-example RUN -o both.html"),
    ),
    "doctor": CommandAt("doctor", "doctor", ("bf16prof doctor", "bf16prof doctor --json")),
    "schema": CommandAt("schemas", "schema", ("bf16prof schema", "bf16prof schema estimate")),
    "profiles": CommandAt("catalog", "profiles", ("bf16prof profiles list", "bf16prof profiles show cpu-demo --resolved"), is_group=True),
    "cache": CommandAt("cache", "cache", ("bf16prof cache list", "bf16prof cache clear"), is_group=True),
    "published": CommandAt("published", "published", ("bf16prof published list", "bf16prof report published:issue-7434"), is_group=True),
    "recipes": CommandAt("catalog", "recipes", ("bf16prof recipes list", "bf16prof recipes show bf16-full"), is_group=True),
}
"""In the order of the help page."""


def make_app(words: Sequence[str] = ()) -> LiteralTyper:
    """The application for these words of a command line: of their command alone, where they begin
    with one."""
    app = make_bare()
    for name in words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS:
        _add(app, name, COMMANDS[name])
    return app


def make_bare() -> LiteralTyper:
    """The application without commands."""
    app = LiteralTyper(
        name="bf16prof",
        help="Predict, measure and reconcile the memory of DeepSpeed training with low-precision recipes.",
        epilog=EXIT_CODES,
        invoke_without_command=True,
        pretty_exceptions_show_locals=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(common)
    return app


def front_page(words: Sequence[str]) -> LiteralTyper:
    """The application for words that name no command, where one line says what each does: none is
    imported, none can be run."""
    if any(word in COMMANDS for word in words):
        return make_app(words)
    app = make_bare()
    for name, entry in COMMANDS.items():
        _add_line(app, name, entry)
    return app


def _add_line(app: LiteralTyper, name: str, entry: CommandAt) -> None:
    source = (Path(__file__).parent / "commands" / f"{entry.module}.py").read_text(encoding="utf-8")
    text = _help_in(source, entry.attribute)
    if text is None:
        _add(app, name, entry)
    elif entry.is_group:
        app.add_typer(LiteralTyper(help=text), name=name)
    else:
        app.command(name, help=text)(lambda: None)


def _help_in(source: str, attribute: str) -> str | None:
    """The help of a command, as its module has it: a function's docstring, or what a group is made
    with; `None` if it has neither."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return ast.get_docstring(node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _is_name(node.targets[0], attribute):
            words = (each.value for each in node.value.keywords if each.arg == "help")
            return next((each.value for each in words if isinstance(each, ast.Constant) and isinstance(each.value, str)), None)
    return None


def _is_name(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Name) and target.id == name


def _add(app: LiteralTyper, name: str, entry: CommandAt) -> None:
    found = getattr(importlib.import_module(f"bf16prof.commands.{entry.module}"), entry.attribute)
    if entry.is_group:
        app.add_typer(found, name=name, epilog=examples(*entry.examples))
    else:
        app.command(name, takes_script=entry.takes_script, epilog=examples(*entry.examples))(found)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bf16prof {__version__}")
        raise typer.Exit


TO_TRY = """\
Will it fit, how fast is it, does it still learn? Three lines to try:

  bf16prof plan llama3.1-8b --gpus 8 --gpu h100   what fits these GPUs, ranked
  bf16prof estimate config.json --gpus 8          your own model, in a second
  bf16prof measure --simulate                     real ranks on this machine

All commands: bf16prof -h
"""
"""What the program says where nobody asked for anything."""


def common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Predict, measure and reconcile the memory of DeepSpeed training with low-precision
    recipes."""
    if context.invoked_subcommand is None:
        typer.echo(TO_TRY, nl=False)
