"""How a name that somebody typed finds what it stands for: one mechanism for GPUs, recipes,
presets, families and keys.

Letter case and punctuation do not count (`Qwen2.5_7B` is `qwen2.5-7b`), nor does the unit of a size
of memory (`a100-80` is `a100-80gb`). Where one number ends and the next begins counts: `qwen2-57b`
is not `qwen2.5-7b`. A table of things that people call by a part of their name (`4090`, `H100 SXM`)
finds the one row that has all the words. Whatever finds nothing, or several, is refused with the
nearest names.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

from bf16prof.errors import InputError

Row = TypeVar("Row")

SUGGESTED, MOST_SHOWN = 5, 12
FEW = 20
"""So many names are listed after those that are near; more only where none is near."""

LONGEST_SHOWN = 80
ALIKE = 0.6
"""From this similarity on (`difflib`'s ratio) a name is near enough to be suggested."""


def named(
    what: str,
    typed: str,
    rows: Mapping[str, Row],
    others: Callable[[Row], Iterable[str]] = lambda row: (),
    *,
    partly: bool = False,
    more: str = "",
) -> Row:
    """The row that somebody means.

    `others`: further names of a row, beside its key. `partly`: some words of a name are enough,
    where only one row has them all. `more`: what else may be typed, for the hint. Raises
    `InputError` that says what is unknown, or not clear, and which names are near.
    """
    names = {key: (key, *others(row)) for key, row in rows.items()}
    found = matches(typed, names, partly=partly)
    if len(found) == 1:
        return rows[found[0]]
    if found:
        raise InputError(f"{what} {shown(typed)} may be any of {len(found)}", hint=did_you_mean(found))
    raise unknown(what, typed, names, more=more)


def unknown(what: str, typed: str, names: Mapping[str, Collection[str]] | Iterable[str], *, more: str = "", where: str = "") -> InputError:
    """The refusal of a name that stands for nothing: with the names that are near, and all where
    they are few.

    `where`: what the line begins with.
    """
    known = list(names)
    near = did_you_mean(nearest(typed, names if isinstance(names, Mapping) else known))
    listed = "known: " + ", ".join(known) if not near or len(known) <= FEW else ""
    hint = " ".join(filter(None, (near, listed, f"({more})" if more else "")))
    return InputError(f"{where}unknown {what} {shown(typed)}", hint=hint)


def matches(typed: str, names: Mapping[str, Collection[str]], *, partly: bool = False) -> list[str]:
    """The keys that a typed name stands for: the one that is written so, else all that have such a
    name, else (`partly`) all its words."""
    if typed in names:
        return [typed]
    same = [key for key, each in names.items() if any(is_same(typed, name) for name in each)]
    return same or ([key for key, each in names.items() if _has_words(typed, each)] if partly else [])


def shown(typed: str) -> str:
    """What was typed, in quotes and not endless."""
    return repr(typed if len(typed) <= LONGEST_SHOWN else f"{typed[:LONGEST_SHOWN]}...")


def did_you_mean(near: Collection[str]) -> str:
    """The question for a hint; empty where nothing is near."""
    return f"did you mean {', '.join([*near][:MOST_SHOWN])}?" if near else ""


def nearest(typed: str, names: Mapping[str, Collection[str]] | Iterable[str]) -> list[str]:
    """The keys whose names are near the typed one, the nearest first: those that contain it, those
    it contains, and those spelled alike."""
    table = names if isinstance(names, Mapping) else {name: (name,) for name in names}
    wanted = "".join(_words(typed[:LONGEST_SHOWN]))
    scores = {key: max((_likeness(wanted, name, in_part=name == key) for name in each), default=0.0) for key, each in table.items()}
    ranked = sorted((key for key, score in scores.items() if score >= ALIKE), key=lambda key: -scores[key])
    return ranked[:SUGGESTED]


def is_same(typed: str, name: str) -> bool:
    """Whether two names are the same letters and digits, with numbers that end in the same places,
    or one of them written as one word."""
    one, other = _without_unit(_words(typed)), _without_unit(_words(name))
    if "".join(one) != "".join(other) or not one:
        return False
    return 1 in (len(one), len(other)) or not _cuts(typed).isdisjoint(_cuts(name))


def _likeness(typed: str, name: str, *, in_part: bool) -> float:
    """0 to 1: `difflib`'s ratio to the whole name, or (`in_part`) to the most alike part of it,
    which counts a little less."""
    words = _words(name)
    whole = "".join(words)
    inside = 0.9 if len(typed) >= 3 and typed in whole else 0.0
    parts = _parts(words) if in_part else ()
    return max(inside, _ratio(typed, whole), max((0.9 * _ratio(typed, part) for part in parts), default=0.0))


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _words(name: str) -> list[str]:
    """The runs of letters and digits. A point between two digits belongs to a version (2.5) and is
    left out, as some do."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=\d)\.(?=\d)", "", name.casefold()))


def _without_unit(words: Iterable[str]) -> list[str]:
    """The words, sizes of memory without their unit: 80gb, 80gib and 80g are 80."""
    return [re.sub(r"^(\d+)g(i?b)?$", r"\1", word) for word in words]


def _cuts(name: str) -> set[frozenset[int]]:
    """Where one number ends and the next begins, in letters and digits from the start: with the
    points of versions as ends, and without."""
    found = set()
    for words in (_words(name), re.findall(r"[^\W_]+", name.casefold())):
        ends = itertools.accumulate(map(len, _without_unit(words[:-1])))
        found.add(
            frozenset(
                end for end, (one, other) in zip(ends, itertools.pairwise(words), strict=True) if one[-1:].isdigit() and other[:1].isdigit()
            )
        )
    return found


def _parts(words: list[str]) -> set[str]:
    """All words, and those that follow each other written as one."""
    return {"".join(words[start:end]) for start in range(len(words)) for end in range(start + 1, len(words) + 1)}


def _has_words(typed: str, names: Collection[str]) -> bool:
    """Whether every word that was typed is a word of one of the names, or several in a row."""
    known = set()
    for name in names:
        words = _words(name)
        known |= _parts(words) | _parts(_without_unit(words))
    wanted = _words(typed)
    return bool(wanted) and all(word in known or _without_unit([word])[0] in known for word in wanted)
