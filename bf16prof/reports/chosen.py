"""Which cases are shown where there is no room for all, and which one stands for the page."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.reports.views import CaseView
from bf16prof.verdict import judge
from bf16prof.vocabulary import Verdict

FEW = 4
"""Up to so many cases each has a bar on the first screen."""


def nearest_the_limit(views: Sequence[CaseView], most: int) -> list[CaseView]:
    """At most so many cases, in their order: measured ones first, then those that just fit, then
    those that just do not."""
    if len(views) <= most:
        return list(views)
    ranked = sorted(views, key=lambda view: (view.reference is None, *_distance(view)))[:most]
    return [view for view in views if any(view is one for one in ranked)]


def headline_case(views: Sequence[CaseView]) -> CaseView | None:
    """The case that the first screen takes apart: of few cases the one that needs most, of many the
    one that just fits."""
    known = [view for view in views if needs(view)]
    if len(known) <= FEW:
        return max(known, key=needs, default=None)
    return min(nearest_the_limit(known, FEW), key=_distance)


def needs(view: CaseView) -> int:
    """The most that is known to be allocated."""
    main = view.main
    return max(main.run_peak_allocated_bytes or 0, main.peak_allocated_bytes or 0, main.allocated_bytes or 0)


def _distance(view: CaseView) -> tuple[bool, float]:
    """Whether a case does not fit, and how far its peak is from what its GPU has; without a GPU the
    largest comes first."""
    found = next((one for record in view.records.values() if (one := judge(record))), None)
    if found is None or found.limit_bytes is None:
        return True, -needs(view)
    return found.verdict is not Verdict.FITS, abs(found.limit_bytes - needs(view))
