"""Help pages: plain text in two columns, as wide as the terminal, in which no flag is cut and every
text is printed as it is written.

`-h` shows what most people need, `--help` every flag, `--help-all` also the variable that stands
for each and the values that it takes.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

NAMES = ["-h", "--help", "--help-all"]
EXIT_CODES = (
    "Exit codes: 0 ok, 1 internal error, 2 bad input, 3 the run failed, 4 outside --fail-over or not --fail-unless-fits, "
    "130/143/129 interrupted."
)

EVERYDAY = frozenset({
    "subject", "gpus", "gpu", "zero", "recipe", "ds_config", "sequence_length", "micro_batch_size", "ranks", "simulate", "quality",
    "output", "json_", "runs", "files", "open_", "name", "write", "verify", "resolved",
})  # fmt: skip
"""Parameters that `-h` shows."""

_WIDEST, _NARROWEST = 100, 40
_FLAGS = 26
"""Columns of the flags; a longer one has a line of its own."""

_TWO_COLUMNS = 72
"""Narrower pages have what a flag means below it."""

_VARIABLES = "Every flag with a value also stands in a variable: --zero in BF16PROF_ZERO (--help-all names them)."


def examples(*lines: str) -> str:
    """The end of a command's help: examples to type, and the exit codes."""
    return "\n\n".join(["Examples:", *lines, EXIT_CODES])


def level_of(arguments: Iterable[str]) -> str:
    """Which page was asked for: `short`, `full` or `all`."""
    typed = set(arguments)
    return "all" if "--help-all" in typed else "full" if "--help" in typed or "-h" not in typed else "short"


def help_page(command: Any, context: Any, level: str) -> str:
    """The page of a command or of a group of commands."""
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
    lines = [f"Usage: {context.command_path} {' '.join(command.collect_usage_pieces(context))}", ""]
    lines += _paragraphs((command.help or "").strip(), width)
    shown = [each for each in command.get_params(context) if not getattr(each, "hidden", False)]
    if level == "short" and any(each.name in EVERYDAY for each in shown):
        left_out = [each for each in shown if each.name not in EVERYDAY and each.name != "help"]
        shown = [each for each in shown if each not in left_out]
    for title, members in _panels(shown):
        lines += [f"{title}:", *(line for each in members for line in _row(*_parameter(each, context, level), width)), ""]
    inner = getattr(command, "commands", {})
    if inner:
        lines += ["Commands:", *(line for name, each in inner.items() for line in _row(name, _first(each.help), width)), ""]
    if level == "short":
        lines += _paragraphs("More flags: --help. All that there is to know of each: --help-all.", width)
    elif any(getattr(each, "envvar", None) for each in shown) and level == "full":
        lines += _paragraphs(_VARIABLES, width)
    return "\n".join([*lines, *_paragraphs((command.epilog or "").strip(), width, indent_examples=True)]).rstrip() + "\n"


def _panels(parameters: Iterable[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Arguments, then the flags by the panel that they name, each panel where its first flag
    stands."""
    found: dict[str, list[Any]] = {}
    for each in parameters:
        is_argument = each.param_type_name == "argument"
        found.setdefault("Arguments" if is_argument else getattr(each, "rich_help_panel", None) or "Options", []).append(each)
    yield from sorted(found.items(), key=lambda panel: (panel[0] != "Arguments", panel[0] == "Options"))


def _parameter(each: Any, context: Any, level: str) -> tuple[str, str]:
    """What stands left and right: the names with what they take, and what they mean."""
    if each.param_type_name == "argument":
        return each.metavar or each.name.upper(), each.help or ""
    names = ", ".join(sorted(each.opts, key=len)) + (f" / {', '.join(each.secondary_opts)}" if each.secondary_opts else "")
    takes = "" if each.is_flag or each.count else f" {each.metavar or _takes(each, context)}"
    said = [each.help or ""]
    default = each.default
    if each.show_default and default not in (None, "", False, True, ()) and not callable(default):
        said.append(f"[{', '.join(map(str, default)) if isinstance(default, list | tuple) else default}]")
    if level == "all":
        said += [f"Variable: {each.envvar}."] if each.envvar else []
    return f"{names}{takes}", " ".join(said)


def _takes(each: Any, context: Any) -> str:
    """The values of a choice, else one word in capitals. Typer has named the method that knows them
    differently over time."""
    show = getattr(each, "display_type_rich", None) or each.make_metavar
    written = str(show(ctx=context)).strip("<>[]")
    if "|" in written:
        return written
    return {"str": "TEXT", "path": "FILE"}.get(written.split(" ")[0].lower(), "N")


def _row(left: str, right: str, width: int) -> list[str]:
    """One or more lines: the left column, and the right one beside it, or below where the left is
    too long or the page is narrow."""
    indent = " " * (_FLAGS + 2 if width >= _TWO_COLUMNS else 6)
    folds: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
    text = textwrap.wrap(right, width, initial_indent=indent, subsequent_indent=indent, **folds)
    if len(left) <= len(indent) - 4:
        return [f"  {left}".ljust(len(indent)) + (text[0].strip() if text else ""), *text[1:]]
    return [f"  {left}", *text]


def _paragraphs(text: str, width: int, *, indent_examples: bool = False) -> list[str]:
    """Paragraphs, folded; commands to type are indented and in one piece."""
    lines: list[str] = []
    for part in filter(None, text.split("\n\n")):
        if indent_examples and part.startswith(("bf16prof ", "... ")):
            lines.append(f" {part}")
            continue
        if lines and lines[-1].startswith(" "):
            lines.append("")
        lines += textwrap.wrap(" ".join(part.split()), width)
        if not part.endswith("Examples:"):
            lines.append("")
    return lines


def _first(text: str | None) -> str:
    """The first sentence of a command's help."""
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    return paragraph.partition(": ")[0].rstrip(".") + "." if len(paragraph) > 90 and ": " in paragraph else paragraph
