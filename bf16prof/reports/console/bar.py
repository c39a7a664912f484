"""Memory as a bar of characters: a letter per component, on its colour where there are colours, up
to what the allocator may hold."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from bf16prof.reports import palette
from bf16prof.reports.units import gib, share
from bf16prof.reports.views import component_name
from bf16prof.vocabulary import Component

WIDEST = 100
_FREE, _LIMIT, _UNTOLD = ".", "|", "?"


def memory_bar(parts: Mapping[Component, int], total: int, limit: int | None, console: Console) -> None:
    """Print the bytes of each component, what is left of the total and what is free, then what the
    letters mean.

    The bar is as long as the limit, or as the total where that is more; its limit is a vertical
    line.
    """
    width = min(console.width, WIDEST)
    whole = max(total, limit or 0)
    if not whole:
        return
    console.print(_bar(parts, total, limit, whole, width))
    key = [_key(c, size, total) for c, size in sorted(parts.items(), key=lambda pair: -pair[1]) if size * 1000 >= total]
    rest = total - sum(parts.values())
    key += [Text(f"{_UNTOLD} not told apart {gib(rest)}")] if rest * 1000 >= total else []
    key += [Text(f"{_LIMIT} limit {gib(limit)}")] if limit else []
    console.print(_folded(key, width))


def _bar(parts: Mapping[Component, int], total: int, limit: int | None, whole: int, width: int) -> Text:
    bar, reached, columns = Text(no_wrap=True), 0, width - 1
    for component in Component:
        if size := parts.get(component, 0):
            start, reached = round(reached / whole * columns), reached + size
            cells = round(reached / whole * columns) - start
            colour = palette.COMPONENTS[component]
            bar.append(palette.LETTERS[component] * cells, f"{palette.on(colour)} on {colour}")
    bar.append(_UNTOLD * (round(total / whole * columns) - len(bar)), "dim")
    if limit is None:
        return bar
    at = round(limit / whole * columns)
    bar.append(_FREE * max(0, at - len(bar)), "dim")
    return Text.assemble(bar[:at], (_LIMIT, "bold red"), bar[at:])


def _key(component: Component, size: int, total: int) -> Text:
    colour = palette.COMPONENTS[component]
    letter = (palette.LETTERS[component], f"{palette.on(colour)} on {colour}")
    return Text.assemble(letter, f" {component_name(component)} {gib(size)} ({share(size, total)})")


def _folded(parts: list[Text], width: int) -> Text:
    """The parts one after the other, never broken within."""
    lines, used = [Text()], 0
    for part in parts:
        if used and used + 3 + part.cell_len > width:
            lines.append(Text())
            used = 0
        lines[-1].append("   " if used else "").append_text(part)
        used += (3 if used else 0) + part.cell_len
    return Text("\n").join(lines)
