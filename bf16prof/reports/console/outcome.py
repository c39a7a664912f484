"""One screen of an answer, in the same order everywhere: what was asked, the verdict, the picture,
the table.

What to change and the next command follow, which the command knows. Everything else is in `-v` and
on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bf16prof.records import MemoryRecord
from bf16prof.reports.chosen import headline_case, needs
from bf16prof.reports.console.asked import asked
from bf16prof.reports.console.bar import memory_bar
from bf16prof.reports.console.fit_map import fit_map_view
from bf16prof.reports.console.fitted import Fitted, fitted
from bf16prof.reports.console.layout import heading, mark, note
from bf16prof.reports.console.quantities import quantities
from bf16prof.reports.fit_map import fit_maps
from bf16prof.reports.limit_lines import limit_of
from bf16prof.reports.palette import CONSOLE
from bf16prof.reports.ranks import imbalance
from bf16prof.reports.units import AS_PRINTED, AT_LEAST, CONSISTENT, EXACT, UNKNOWN, gib, number, scale, seconds, signed_percent
from bf16prof.reports.verdict import Style, case_verdict, verdict
from bf16prof.reports.views import CaseView, Headline, Line, headline, losses, provenance, run_views
from bf16prof.runs import Run, Status
from bf16prof.vocabulary import Source

MOST_NAMES = 3
"""Of more cases that do not fit, the table says which."""

_Column = tuple[str, Callable[[CaseView], Text], int]
"""Its header, what it says of a case, and how early it goes where there is no room; 0: never."""


def outcome(runs: Sequence[Run], console: Console) -> None:
    """Print what was asked, the verdict on all cases, the peak of one as a bar, and one row per
    case, of a grid a map.

    Of one case from a log the table has a row for each quantity that was logged: logs seldom hold
    both of those that the columns name.
    """
    views = run_views(runs)
    asked([record for run in runs for record in run.records], console)
    for style, text in verdicts(runs, views):
        console.print(Text(f"{mark(console, style)} {text}", CONSOLE[style]))
    shown = headline_case(views) or (views[0] if len(views) == 1 else None)
    if shown is not None:
        picture(shown, console)
    if maps := fit_maps(views):
        fit_map_view(maps, console)
    elif len(views) == 1 and _is_logged(views[0]):
        console.print()
        quantities(views[0], console, logged_only=True)
        note(console, "Errors are (prediction - imported) / imported; 1 GiB = 2^30 bytes. -v shows every component and phase.")
    elif views:
        console.print()
        console.print(_table(views, console.width))
        _notes(views, console)


def _is_logged(view: CaseView) -> bool:
    return view.reference is not None and view.reference.source is Source.IMPORT


def verdicts(runs: Sequence[Run], views: Sequence[CaseView]) -> list[tuple[Style, str]]:
    """What came of it, one sentence each: how the cases ended, whether they fit, how good the
    predictions were."""
    said: list[tuple[Style, str]] = []
    statuses = [case.status for run in runs for case in run.manifest.cases]
    ended = [status for status in statuses if status is not Status.FINISHED]
    if ended:
        counts = ", ".join(f"{ended.count(status)} {status}" for status in dict.fromkeys(ended))
        said.append(("bad", f"{len(statuses) - len(ended)} of {len(statuses)} cases finished: {counts}."))
    said += _fits(views)
    head = headline(views)
    if head.compared or head.worst_peak:
        said.append(_predictions(head))
    return said


def _fits(views: Sequence[CaseView]) -> list[tuple[Style, str]]:
    found = [(view, one) for view in views if (one := case_verdict(view))]
    if not found:
        return []
    if len(found) == 1:
        ((view, one),) = found
        return [(one.style, ("predicted: " if view.reference and not verdict(view.reference) else "") + one.text)]
    fitting = sum(one.fits for _, one in found)
    style: Style = "good" if fitting == len(found) else "bad" if any(one.style == "bad" for _, one in found) else "warn"
    without = [view.label for view, one in found if not one.fits]
    names = f": not {', '.join(without)}" if 0 < len(without) <= MOST_NAMES else ""
    return [(style, f"{fitting} of {len(found)} cases fit the GPU{names}.")]


def _predictions(head: Headline) -> tuple[Style, str]:
    """How far predictions are off, between steps and at the peak, as one sentence."""
    good = head.exact + head.as_printed == head.compared
    if good:
        steady = "exact to the byte" if head.exact == head.compared else "as far as was printed"
        parts = [f"between steps every prediction is {steady}"] if head.compared else []
    else:
        parts = [f"between steps {head.exact} of {head.compared} predictions are exact"]
        parts[-1] += f", the others within {_within(head.worst)}" if head.worst else ""
    if head.worst_peak:
        error = _error_of(head.worst_peak)
        good = good and error <= _GOOD
        parts.append("peaks are exact" if not error else f"peaks are within {_within(head.worst_peak)}")
    said = "; ".join(parts)
    return "good" if good else "warn", f"{said[:1].upper()}{said[1:]}."


_GOOD = 0.01


def _error_of(worst: tuple[CaseView, Line, Source]) -> float:
    return abs(worst[1].errors.get(worst[2]) or 0.0)


def _within(worst: tuple[CaseView, Line, Source]) -> str:
    return signed_percent(_error_of(worst)).removeprefix("+")


def picture(view: CaseView, console: Console) -> None:
    """Print the peak of a case as a bar of its components against the limit; what is held between
    steps where no more is known."""
    record = next((r for r in (view.main, *view.predictions) if r.peak_components), view.main)
    parts = record.peak_components or (record.components if record.peak_allocated_bytes is None else {})
    total, limit = sum(parts.values()) or needs(view), limit_of(view)
    if not total or not (parts or limit):
        return
    said = "" if record is view.main or view.reference is None else f", {provenance(record)}"
    heading(console, Text(f"{view.label} {_instant(record, told_apart=bool(parts))}{said}: {gib(total)}"))
    memory_bar(parts, total, limit, console)


def _instant(record: MemoryRecord, *, told_apart: bool) -> str:
    """The moment that the bar shows: of a record whose components are known between steps only,
    that one."""
    if record.peak_allocated_bytes is not None:
        return "at the training peak" + (f", in {record.peak_phase}" if record.peak_phase else "")
    return "between steps" if told_apart or record.run_peak_allocated_bytes is None else "at the peak of the whole run"


def _best(view: CaseView) -> MemoryRecord | None:
    """The prediction to show beside the measurement: the dry run, which knows the peaks everywhere,
    else the estimate."""
    known = {record.source: record for record in view.predictions}
    return known.get(Source.SIMULATE) or known.get(Source.ESTIMATE)


def _table(views: Sequence[CaseView], width: int) -> Table:
    """One row per case. Where there is no room for all columns, the predicted bytes go first: their
    errors stay."""
    columns = _Columns(views)
    every = columns.measured() if any(view.reference for view in views) else columns.predicted()
    fitting = [Fitted(header, drop, "left" if header == "case" else "right") for header, _, drop in every]
    return fitted(fitting, [[make(view) for _, make, _ in every] for view in views], width)


class _Columns:
    """The columns of a table over these cases, bytes and seconds in one unit each, which the
    headers name."""

    def __init__(self, views: Sequence[CaseView]) -> None:
        self._divisor, self._unit = scale(max((needs(view) for view in views), default=0))
        slowest = max((view.main.step_time_s or 0.0 for view in views), default=0.0)
        self._second, self._time = (1.0, "s") if slowest >= 10 else (1e3, "ms")
        ranks = {view.case.world_size for view in views}
        self._same = f"-w{ranks.pop()}-" if len(views) > 1 and len(ranks) == 1 else ""

    def measured(self) -> list[_Column]:
        """Of cases that ran."""
        steady = "allocated_bytes"
        return [
            ("case", self._case, 0),
            (f"steady\nmeas.\n{self._unit}", lambda view: self._of(view.reference, steady), 0),
            (f"steady\npred.\n{self._unit}", lambda view: self._of(_best(view), steady), 3),
            ("error\n%", lambda view: _error(view, steady), 0),
            (f"peak\nmeas.\n{self._unit}", lambda view: self._of(view.reference, _peak(view)), 0),
            (f"peak\npred.\n{self._unit}", lambda view: self._of(_best(view), _peak(view)), 4),
            ("error\n%", lambda view: _error(view, _peak(view)), 0),
            (f"step\n{self._time}", self._step, 1),
            ("loss", _loss, 2),
        ]

    def predicted(self) -> list[_Column]:
        """Of cases that did not."""
        return [
            ("case", self._case, 0),
            (f"peak\n{self._unit}", lambda view: self._of(view.main, "peak_allocated_bytes"), 0),
            ("in", lambda view: Text(str(view.main.peak_phase or UNKNOWN)), 3),
            (f"init\n{self._unit}", self._init, 2),
            (f"reserved\n{self._unit}", lambda view: self._of(view.main, "reserved_bytes"), 4),
            (f"steady\n{self._unit}", lambda view: self._of(view.main, "allocated_bytes"), 1),
            ("step\nat least", _floor, 5),
            ("verdict", _verdict, 0),
        ]

    def _case(self, view: CaseView) -> Text:
        """Its label, without the number of ranks where all have the same."""
        return Text(view.label.replace(self._same, "-", 1) if self._same else view.label)

    def _of(self, record: MemoryRecord | None, quantity: str) -> Text:
        size = getattr(record, quantity) if record else None
        if record is None or size is None:
            return Text(UNKNOWN)
        return Text(f"{AT_LEAST if quantity in record.at_least else ''}{size / self._divisor:,.2f}")

    def _init(self, view: CaseView) -> Text:
        whole, training = view.main.run_peak_allocated_bytes, view.main.peak_allocated_bytes
        return self._of(view.main, "run_peak_allocated_bytes") if whole and training and whole > training else Text("")

    def _step(self, view: CaseView) -> Text:
        known = view.main.step_time_s
        return Text(UNKNOWN if known is None else f"{known * self._second:,.1f}")


def _peak(view: CaseView) -> str:
    """The peak to compare: of training, or of the whole run where a log tells no other."""
    return "run_peak_allocated_bytes" if view.whole_run_only else "peak_allocated_bytes"


def _error(view: CaseView, quantity: str) -> Text:
    """By how much the prediction that is shown misses."""
    line, record = view.line(quantity), _best(view)
    if line is None or record is None:
        return Text(UNKNOWN)
    if record.source in line.consistent:
        return Text(CONSISTENT, "green")
    if record.source not in line.differences:
        return Text(UNKNOWN)
    if line.differences[record.source] == 0:
        return Text(EXACT, "green")
    if line.as_printed(record.source):
        return Text(AS_PRINTED, "green")
    error = line.errors.get(record.source)
    return Text(signed_percent(error).removesuffix(" %"), "green" if error is not None and abs(error) <= _GOOD else "yellow")


def _floor(view: CaseView) -> Text:
    known = (record.step_time_floor_s for record in view.records.values())
    return Text(seconds(next((floor for floor in known if floor is not None), None)))


def _verdict(view: CaseView) -> Text:
    said = case_verdict(view)
    return Text(said.short, CONSOLE[said.style]) if said else Text(UNKNOWN)


def _loss(view: CaseView) -> Text:
    curve = losses(view.main)
    last = curve[-1][1] if curve else view.main.loss
    return Text(number(last) if not curve or last is not None else "not finite")


def _notes(views: Sequence[CaseView], console: Console) -> None:
    for text in imbalance(views[0].main) if len(views) == 1 else ():
        note(console, text)
    ranks = {view.case.world_size for view in views}
    each = f"{ranks.pop()} ranks. " if len(ranks) == 1 and len(views) > 1 else ""
    if any(view.reference for view in views):
        shown = {record.source for view in views if (record := _best(view))}
        by = " and ".join(sorted("the dry run" if source is Source.SIMULATE else "the closed form" for source in shown))
        note(console, f"{each}Steady: between steps; peak: {_which_peak(views)}; predicted by {by or 'nothing'}. -v shows every phase.")
    else:
        training = "Peak: of training; steady" if any(view.main.peak_allocated_bytes is not None for view in views) else "Steady"
        note(console, f"{each}{training}: between steps. 1 GiB = 2^30 bytes. -v shows every component.")


def _which_peak(views: Sequence[CaseView]) -> str:
    """Which peaks the table has of those that were measured or logged."""
    of_the_whole_run = {bool(view.whole_run_only) for view in views if view.reference and getattr(view.reference, _peak(view)) is not None}
    if of_the_whole_run == {True}:
        return "of the whole run"
    return "of training or, where a log tells no other, of the whole run" if True in of_the_whole_run else "of training"
