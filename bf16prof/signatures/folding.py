"""A model of many layers by one of few: which of the few's events the many's repeat, shown event by
event.

Both are recorded on the same batch and length. The deep model does what the shallow one does, but
for parts that it does again and again, once for every layer that the shallow one has not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from bf16prof.signatures.general import Stretch
from bf16prof.signatures.happenings import Happening, further, number_of


def fold(deep: Sequence[Happening], shallow: Sequence[Happening], more: int) -> list[Stretch] | None:
    """The deep model's events as runs of the shallow one's; `more`: layers that it has more. `None`
    where that is not what it does."""
    known: dict[Hashable, int] = {}
    first, second = ([known.setdefault(each.regardless_of_layer(), len(known)) for each in events] for events in (deep, shallow))
    places = _places(first, second, more)
    runs: list[Stretch] = []
    for place, event in zip(places or (), deep, strict=False):
        layers = _further_on(event, shallow[place])
        if layers is None and runs:
            layers = runs[-1].layers
        if runs and runs[-1].stop == place and runs[-1].layers == (layers or 0):
            runs[-1] = Stretch(runs[-1].start, place + 1, runs[-1].layers)
        else:
            runs.append(Stretch(place, place + 1, layers or 0))
    is_same = places is not None and all(
        event.name == further(shallow[place].name, run.layers)
        for event, (place, run) in zip(deep, ((p, run) for run in runs for p in range(run.start, run.stop)), strict=True)
    )
    return runs if is_same else None


def _places(deep: Sequence[int], shallow: Sequence[int], more: int) -> list[int] | None:
    """For every event of the deep model its place in the shallow one's."""
    places: list[int] = []
    place = 0
    while len(places) < len(deep):
        start = len(places)
        while start < len(deep) and place < len(shallow) and deep[start] == shallow[place]:
            places.append(place)
            start, place = start + 1, place + 1
        if start == len(deep):
            break
        repeated = _repeated(deep, start, shallow, place, more)
        if repeated is None:
            return None
        length, times = repeated
        places += [*range(place - length, place)] * times
    return places if place == len(shallow) else None


def _repeated(deep: Sequence[int], start: int, shallow: Sequence[int], place: int, more: int) -> tuple[int, int] | None:
    """How many of the last events come again, and how often: once for each of the layers, or for
    each of their groups."""
    for times in (count for count in range(more, 0, -1) if more % count == 0):
        for length in range(1, min(place, (len(deep) - start) // times) + 1):
            if deep[start] != shallow[place - length]:
                continue
            if list(deep[start : start + length * times]) == list(shallow[place - length : place]) * times:
                return length, times
    return None


def _further_on(deep: Happening, shallow: Happening) -> int | None:
    """By how many layers the names of two events differ; `None` of events that name no layer."""
    numbers = number_of(deep.name), number_of(shallow.name)
    return None if None in numbers else numbers[0] - numbers[1]  # type: ignore[operator]
