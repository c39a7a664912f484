"""Loss curves in numbers: the last loss, the mean, the standard deviation and the running mean, of
one run and over seeds.

One seed of a noisy run proves nothing: runs whose profiles differ in `workload.seed` only are one
group, and a group has an interval. The gap of a recipe is the mean of its differences to a
reference seed by seed: with one seed, two runs have one initialisation and read the same batches,
so that what is the batches' doing cancels.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bf16prof.profiles.recipes import all_recipes
from bf16prof.records import MemoryRecord
from bf16prof.reports.intervals import Interval, t_interval
from bf16prof.reports.views import CaseView, losses

WINDOW_SHARE = 10
"""The running mean is over the last tenth of all steps."""

_SAME_LEARNING = ("type", "lr", "betas", "eps", "weight_decay")
"""Keys of the profile's optimizer that decide what is learned; the others choose an
implementation."""


@dataclass(frozen=True)
class LossStatistics:
    """One curve of `steps` losses: the last, the mean and the (sample) standard deviation of all,
    and the mean of the last `window`.

    `lost` of the losses were not finite: whatever they are part of is `None`.
    """

    steps: int
    final: float | None
    mean: float | None
    deviation: float | None
    window: int
    tail: float | None
    lost: int = 0


def loss_statistics(record: MemoryRecord) -> LossStatistics | None:
    """The statistics of a record's losses, or those that were published of them; `None` where it
    has neither."""
    values = [loss for _, loss in losses(record)]
    said = record.loss_summary
    if not values:
        return LossStatistics(said.steps, record.loss, said.mean, said.deviation, window_of(said.steps), None) if said else None
    window = window_of(len(values))
    deviation = of_finite(statistics.stdev, values) if len(values) > 1 else None
    mean, tail = of_finite(statistics.fmean, values), of_finite(statistics.fmean, values[-window:])
    return LossStatistics(len(values), values[-1], mean, deviation, window, tail, values.count(None))


def of_finite(statistic: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """A statistic of losses; `None` where one of them was not finite, or their sum is not."""
    known = [value for value in values if value is not None]
    try:
        return statistic(known) if len(known) == len(values) else None
    except OverflowError:
        return None


def window_of(steps: int) -> int:
    """So many losses make one running mean of a curve of so many steps."""
    return max(1, steps // WINDOW_SHARE)


def running_mean(curve: Sequence[tuple[int, float | None]], window: int) -> list[tuple[int, float | None]]:
    """(step, mean of the `window` losses that end there), from the first step that has as many
    before it; `None` where one is.

    Sums run in whole numbers, so that nothing adds up along the curve, however long it is.
    """
    means: list[tuple[int, float | None]] = []
    total = lost = 0
    for end, (step, loss) in enumerate(curve, start=1):
        total, lost = total + _fixed_point(loss), lost + (loss is None)
        if end > window:
            gone = curve[end - 1 - window][1]
            total, lost = total - _fixed_point(gone), lost - (gone is None)
        if end >= window:
            means.append((step, None if lost else total / (window * _ONE)))
    return means


_ONE = 2**60
"""1.0 as a whole number: finer than the digits of any loss that is not below 1e-2, and by 1e-18
else."""


def _fixed_point(loss: float | None) -> int:
    if loss is None:
        return 0
    numerator, denominator = loss.as_integer_ratio()
    return numerator * _ONE // denominator


@dataclass(frozen=True)
class SeedGroup:
    """Views of one case that differ in the seed only, with their numbers in the list that they were
    taken from.

    A view that is alone is a group as well.
    """

    label: str
    views: tuple[CaseView, ...]
    indices: tuple[int, ...]

    @property
    def recipe(self) -> str:
        """The recipe of all of them."""
        return self.views[0].case.recipe

    @cached_property
    def statistics(self) -> list[LossStatistics]:
        """Of each view that has losses."""
        return [found for view in self.views if (found := loss_statistics(view.main))]

    def interval(self, quantity: str) -> Interval | None:
        """Over the seeds, of one field of `LossStatistics`; `None` where one of them does not know
        it: the others are no fair sample."""
        values = [getattr(found, quantity) for found in self.statistics]
        return t_interval(values) if values and None not in values else None

    @cached_property
    def by_seed(self) -> dict[int | None, LossStatistics]:
        """The statistics of each seed."""
        return {seed_of(view.profile): found for view in self.views if (found := loss_statistics(view.main))}


def seed_of(profile: Mapping[str, Any]) -> int | None:
    """The seed that a run's profile says, if it says one."""
    seed = profile.get("workload", {}).get("seed")
    return seed if isinstance(seed, int) else None


def seed_groups(views: Sequence[CaseView]) -> list[SeedGroup]:
    """The views by what they are but for the seed, in the order in which they first appear. The
    same seed again, or one that is not known, is no further sample: it begins another group."""
    found: dict[tuple[str, int], list[int]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for index, view in enumerate(views):
        same, seed = _all_but_seed(view), seed_of(view.profile)
        if seed is None:
            found[f"{same} {index}", 0] = [index]
            continue
        found.setdefault((same, seen[same, seed]), []).append(index)
        seen[same, seed] += 1
    alone = [_without_run(views[members[0]]) for members in found.values()]
    return [
        SeedGroup(name if alone.count(name) == 1 else views[members[0]].label, tuple(views[i] for i in members), tuple(members))
        for name, members in zip(alone, found.values(), strict=True)
    ]


def _without_run(view: CaseView) -> str:
    return view.label.removesuffix(f" [{view.run}]") if view.run else view.label


def _all_but_seed(view: CaseView) -> str:
    return _key(str(view.case), view.device, _profile_without_seed(view))


def _profile_without_seed(view: CaseView) -> dict[str, Any]:
    return {**view.profile, "workload": {k: v for k, v in view.profile.get("workload", {}).items() if k != "seed"}}


def _what_is_learned(group: SeedGroup) -> str:
    """What must be equal where two recipes are compared: the model, the workload, the optimizer's
    formula, the ranks and the steps."""
    view = group.views[0]
    profile = _profile_without_seed(view)
    optimizer = {key: profile.get("optimizer", {}).get(key) for key in _SAME_LEARNING}
    clipping = profile.get("deepspeed", {}).get("gradient_clipping")
    steps = [found.steps for found in group.statistics]
    return _key(view.case.profile, view.case.world_size, profile.get("model"), profile["workload"], optimizer, clipping, steps[:1])


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


@dataclass(frozen=True)
class LossGap:
    """By how much the loss at the end (its running mean) is above that of the reference, over the
    seeds that both have."""

    group: SeedGroup
    reference: SeedGroup
    gap: Interval


def loss_gaps(groups: Sequence[SeedGroup]) -> list[LossGap]:
    """The gap of each group to the group that trains the same with the first recipe of the table
    that keeps an fp32 master copy (`fp32`, then `bf16-fp32-master`, ...); none where there is no
    such group, for the reference itself, or without a seed in common."""
    order = [recipe.id for recipe in all_recipes().values() if recipe.learning == "fp32 master"]
    references: dict[str, SeedGroup] = {}
    for group in sorted((g for g in groups if g.recipe in order and g.statistics), key=lambda g: order.index(g.recipe)):
        references.setdefault(_what_is_learned(group), group)
    pairs = [(group, references.get(_what_is_learned(group))) for group in groups]
    return [
        LossGap(group, reference, difference)
        for group, reference in pairs
        if reference is not None and reference is not group and (difference := paired(group, reference))
    ]


def paired(group: SeedGroup, reference: SeedGroup, quantity: str = "tail") -> Interval | None:
    """The mean over the seeds that both have of their differences in a field of `LossStatistics`;
    `None` without a seed in common, or where one of them does not know the field."""
    known = reference.by_seed
    common = [(found, known[seed]) for seed, found in group.by_seed.items() if seed in known and seed is not None]
    pairs = [(getattr(found, quantity), getattr(other, quantity)) for found, other in common]
    if not pairs or any(None in pair for pair in pairs):
        return None
    return t_interval([value - other for value, other in pairs])
