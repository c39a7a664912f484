"""All that was made up for a script, counted, with the script's own lines: values that do not
exist, files that were not written."""

from __future__ import annotations

from bf16prof.scripts.face.callers import place

MOST_PLACES = 3


class Invented:
    """Collects; `lines` says it."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, int]] = {}

    def note(self, what: str, depth: int = 1) -> None:
        """This was made up now, for the line of the script that runs; not where DeepSpeed asked for
        it on its own account."""
        where = place(depth + 1)
        if where is not None:
            places = self._seen.setdefault(what, {})
            places[where] = places.get(where, 0) + 1

    def lines(self) -> list[str]:
        """One line for each kind of thing, in the order in which they came up."""
        return [f"made up: {what} ({_times(places)})" for what, places in self._seen.items()]


def _times(places: dict[str, int]) -> str:
    ordered = sorted(places.items(), key=lambda pair: -pair[1])
    named = ", ".join(where for where, _ in ordered[:MOST_PLACES])
    more = f" and {len(ordered) - MOST_PLACES} more lines" if len(ordered) > MOST_PLACES else ""
    count = sum(places.values())
    return f"{count} time{'s' if count > 1 else ''}, {named}{more}"
