"""The instant that a message names: "Engine before forward", "Memory stats after training step",
"After the backward pass"."""

from __future__ import annotations

import re

from bf16prof.vocabulary import Phase

_INSTANT = re.compile(r"\b(before|after)\b.*\b(forward|backward|step)\b", re.IGNORECASE)
INSTANT_MARKS = ("before", "after")
"""One of them is in every message that names an instant."""

_LOOKED_AT = 400
"""Characters at the end of a message that are looked at."""


def instant_of(message: str) -> tuple[str, Phase | None]:
    """`("before" or "after", phase)`; `("", None)` where a message names no phase of training."""
    found = _INSTANT.search(message[-_LOOKED_AT:])
    return (found[1].lower(), Phase(found[2].lower())) if found else ("", None)
