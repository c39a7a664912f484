"""The pages of the reference that are read off the code: every command's help, and the JSON Schemas
of what is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any


def write(folder: Path) -> None:
    """Write `commands.md` and `schemas.md` into the folder."""
    folder.mkdir(exist_ok=True)
    for name, text in (("commands.md", commands()), ("schemas.md", schemas())):
        (folder / name).write_text(text, encoding="utf-8")


def commands() -> str:
    """Every command with every flag, its variable and its default: what `--help-all` prints."""
    os.environ["COLUMNS"] = "80"
    from typer.main import get_command

    from bf16prof.app import make_app

    parts = ["# Commands", "", "What `bf16prof COMMAND --help-all` prints.", ""]
    for path, page in _pages(get_command(make_app()), "bf16prof", None):
        parts += [f"## {path}", "", "```text", page.rstrip(), "```", ""]
    return "\n".join(parts)


def _pages(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    from bf16prof.commands.help import help_page

    context = command.context_class(command, info_name=name, parent=parent)
    yield context.command_path, help_page(command, context, "all")
    for inner, each in getattr(command, "commands", {}).items():
        yield from _pages(each, inner, context)


def schemas() -> str:
    """The JSON Schemas of the documents that commands print and run directories hold."""
    parts = ["# JSON Schemas", "", "`bf16prof schema NAME` prints the same. `records` and `run` are files of a run directory,"]
    parts += ["the others what a command prints with `--json`."]
    for file in sorted(resources.files("bf16prof.schemas").iterdir(), key=lambda each: each.name):
        if file.name.endswith(".json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            parts += ["", f"## {file.name.removesuffix('.json')}", ""]
            parts += [content["description"], ""] if "description" in content else []
            parts += ["```json", json.dumps(content, indent=1), "```"]
    return "\n".join([*parts, ""])
