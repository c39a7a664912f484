"""What figures there are: read by every command's flags, and so apart from what draws them, which
takes time to import."""

from __future__ import annotations

from bf16prof.profiles.names import unknown

SUFFIXES = (".png", ".svg", ".pdf")

FIGURES = {
    "memory": "the peak of each case by component, against the GPU's limit",
    "step": "one step, allocation by allocation",
    "map": "what is alive at the peak",
    "layers": "what is alive at the peak, by layer",
    "errors": "from the prediction to the measurement, component by component",
    "ranks": "the peak of each rank",
    "rank_times": "seconds in forward, by rank",
    "phases": "the peak of each phase",
    "timeline": "allocated memory over the steps",
    "times": "seconds per step",
    "losses": "loss by step",
    "differences": "loss by step, less that of the reference",
    "price": "bytes against the learning that takes effect",
    "gap": "bytes against the loss gap",
}
"""Every figure by its name, and what it shows. `step`, `map` and `errors` are of one case: the one
that the page's first screen shows."""

DEFAULT_FIGURE = "memory"


def require_name(name: str) -> None:
    """Raise `InputError` for a name that no figure has."""
    if name not in FIGURES:
        raise unknown("figure", name, list(FIGURES))
