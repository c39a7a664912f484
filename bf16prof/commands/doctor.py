"""`bf16prof doctor`: what this machine can do, one line and a hint each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from bf16prof.commands import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from bf16prof.measuring.findings import Check

_LINE = 400
"""Longest detail or hint that is shown; paths and compilers' version lines are as long as the
machine makes them."""


def doctor(json_: o.JsonOption = False) -> None:
    """Say what this machine can do: torch, DeepSpeed, GPUs, NVML, compilers; one line and a hint
    each.

    It reports and never fails: the exit code is 0 whatever is missing.
    """
    from bf16prof.documents import json_text, raw_document
    from bf16prof.measuring.checks import checks, verdict
    from bf16prof.reports.console import make_console

    found = checks()
    if json_:
        typer.echo(json_text(raw_document([], checks=found)))
        return
    console = make_console()
    _table(found, console)
    console.print()
    console.print(verdict(found), style="bold", markup=False)


def _table(found: list[Check], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from bf16prof.reports.console.layout import safe

    styles = {"ok": "green", "missing": "dim", "warning": "yellow"}
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in found:
        line = safe(check.detail, limit=_LINE)
        if check.hint:
            line = Text("\n").join([line, Text("→ ", "dim") + safe(check.hint, "dim", limit=_LINE)])
        grid.add_row(Text(check.status, styles[check.status]), Text(check.name, "bold"), line)
    console.print(grid)
