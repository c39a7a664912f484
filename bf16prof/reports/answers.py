"""The first screen of the page: five questions in the order in which people ask them, each with one
answer.

Does it fit? Where are the bytes at the peak? How good was the prediction? How fast is it? Does it
learn?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bf16prof.records import MemoryRecord
from bf16prof.reports import palette
from bf16prof.reports.cells import error_style
from bf16prof.reports.chosen import FEW, headline_case, nearest_the_limit, needs
from bf16prof.reports.learning import edq_text, learning, lost_text
from bf16prof.reports.limit_lines import limit_of
from bf16prof.reports.units import AS_PRINTED, EXACT, NOT_FINITE, gib, inert, number, part_of, seconds, share, signed_percent
from bf16prof.reports.verdict import case_verdict
from bf16prof.reports.views import CaseView, Headline, case_label, component_name, headline, loss_text, losses, provenance
from bf16prof.runs import Run, Status
from bf16prof.vocabulary import Component, Verdict


@dataclass(frozen=True)
class BarPart:
    """A part of a bar: how wide it is as a share of the bar's ground, its colour, and what it
    is."""

    share: float
    colour: str
    words: str


@dataclass(frozen=True)
class Bar:
    """A bar of memory: its parts, the thin bar of the steady state and the limit, all as shares of
    its ground."""

    label: str
    text: str
    segments: tuple[BarPart, ...]
    steady: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class ShortAnswer:
    """A question, its answer in a few words, what stands behind it, and bars or a list where these
    say it better."""

    id: str
    question: str
    text: str
    details: tuple[str, ...] = ()
    style: str = ""
    bars: tuple[Bar, ...] = ()
    parts: tuple[tuple[str, str, str], ...] = ()
    """(colour, name, size)."""


MOST_PARTS = 6
"""So many components are listed; the bar shows all."""


def answers(runs: Sequence[Run], views: Sequence[CaseView]) -> list[ShortAnswer]:
    """The five answers, each with what it lacks where nothing is known."""
    shown = headline_case(views)
    ran_out = [case_label(one.case) for run in runs for one in run.manifest.cases if one.status is Status.OOM]
    return [_fits(views, ran_out), _bytes(shown), _errors(headline(views)), _speed(views), _learns(views)]


def _fits(views: Sequence[CaseView], ran_out: Sequence[str]) -> ShortAnswer:
    found = [(view, said) for view in views if (said := case_verdict(view))]
    bars = tuple(_bar(view) for view in nearest_the_limit(views, FEW) if needs(view))
    question = "Does it fit?"
    if not found and ran_out:
        text = f"{palette.SYMBOLS['bad']} {len(ran_out)} of {counted(len(views), 'case')} ran out of memory"
        return ShortAnswer("fits", question, text, (f"{', '.join(ran_out[:3])}{more(ran_out)}",), "bad", bars)
    if not found:
        left = [f"shown: {len(bars)} of {len(views)}"] if len(bars) < len(views) else []
        return ShortAnswer("fits", question, "no GPU to fit", ("no limit is known: these cases name no GPU", *left), bars=bars)
    without = [view.label for view, said in found if not said.fits]
    style = next((style for style in ("bad", "warn") if any(said.style == style for _, said in found)), "good")
    gpus = ", ".join(dict.fromkeys(inert(record.gpu) for view, _ in found for record in view.predictions if record.gpu))
    if len(found) == 1:
        said = found[0][1]
        return ShortAnswer("fits", question, said.marked, (said.text.partition(": ")[2], gpus), style, bars)
    counts = {words: sum(said.answer is verdict for _, said in found) for verdict, words in _COUNTED.items()}
    details = [", ".join(f"{count} {words}" for words, count in counts.items() if count) + (f" on {gpus}" if gpus else "")]
    details += [f"tight or too large: {', '.join(without[:3])}{more(without)}"] if 0 < len(without) <= FEW else []
    details += [f"shown: {len(bars)} of {len(views)}, those nearest to the limit"] if len(bars) < len(views) else []
    return ShortAnswer("fits", question, f"{len(found) - len(without)} of {counted(len(found), 'case')}", tuple(details), style, bars)


_COUNTED = {Verdict.FITS: "fit", Verdict.TIGHT: "tight", Verdict.DOES_NOT_FIT: "do not fit"}


def counted(number: int, what: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {what}{'s' * (number != 1)}"


def more(names: Sequence[str]) -> str:
    """What stands behind the first three of these names."""
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _bar(view: CaseView) -> Bar:
    """The peak of a case against its limit, the bar's ground being as long as the longer of
    both."""
    record, limit = _known(view), limit_of(view)
    most = needs(view)
    ground = max(most, limit or 0) * 1.02
    parts: Mapping[Component, int] = record.peak_components or (record.components if record.peak_allocated_bytes is None else {})
    segments = list(_segments(parts, ground))
    rest = most - sum(parts.values())
    if rest > 0:
        segments.append(BarPart(rest / ground, palette.UNTOLD, f"not told apart {gib(rest)}"))
    said = case_verdict(view)
    text = (part_of(most, limit) if limit else gib(most)) + (f" {said.symbol} {said.answer}" if said else "")
    steady = None if record.allocated_bytes is None else record.allocated_bytes / ground
    return Bar(view.label, text, tuple(segments), steady, limit / ground if limit else None)


def _known(view: CaseView) -> MemoryRecord:
    """The record that knows most of the peak: the reference unless only a prediction tells its
    components apart."""
    return next((r for r in (view.main, *view.predictions) if r.peak_components), view.main)


def _segments(parts: Mapping[Component, int], ground: float) -> Iterator[BarPart]:
    for component in Component:
        if size := parts.get(component, 0):
            yield BarPart(size / ground, palette.COMPONENTS[component], f"{component_name(component)} {gib(size)}")


def _bytes(view: CaseView | None) -> ShortAnswer:
    question = "Where are the bytes?"
    if view is None:
        return ShortAnswer("bytes", question, "not known", ("these runs hold no records",))
    record = _known(view)
    at_peak = bool(record.peak_components)
    parts = {c: size for c, size in (record.peak_components or record.components).items() if size}
    total = sum(parts.values())
    if not parts:
        return ShortAnswer("bytes", question, gib(needs(view)), (f"{view.label}: nobody tells its components apart",))
    phase = f", in {record.peak_phase}" if record.peak_phase else ""
    peak = view.main.peak_allocated_bytes
    untold = "the peak is not known" if peak is None else f"the {gib(peak)} of the peak are not told apart"
    instant = f"at the peak{phase}" if at_peak else "between steps"
    said = (f"{view.label}, {provenance(record)}", *([] if at_peak else [untold]))
    largest = sorted(parts.items(), key=lambda pair: -pair[1])
    listed = tuple((palette.COMPONENTS[c], component_name(c), f"{gib(size)}, {share(size, total)}") for c, size in largest[:MOST_PARTS])
    rest = sum(size for _, size in largest[MOST_PARTS:])
    listed += (("", "others", f"{gib(rest)}, {share(rest, total)}"),) if rest else ()
    bar = Bar("", "", tuple(_segments(parts, total)))
    return ShortAnswer("bytes", question, f"{gib(total)} {instant}", said, "", (bar,), listed)


def _errors(head: Headline) -> ShortAnswer:
    question = "How good was the prediction?"
    if not head.compared and head.worst_peak is None:
        return ShortAnswer(
            "errors",
            question,
            "not measured" if not head.measured else "not predicted",
            (f"{counted(head.cases, 'case')}, nothing to compare",),
        )
    text, details, style = _steady(head)
    if head.worst_peak is not None:
        view, line, source = head.worst_peak
        peak = EXACT if line.errors[source] == 0 else signed_percent(line.errors[source])
        details.insert(0, f"peaks: largest error {peak}, {source} of {view.label}, {line.label}")
        text = f"{peak} at the peak"
        style = max(style, error_style(line, source), key=("", "good", "warn", "bad").index)
    return ShortAnswer("errors", question, text, tuple(details), style)


def _steady(head: Headline) -> tuple[str, list[str], str]:
    """How good predictions of the steady state are: in a word, in detail, and whether that is good
    news."""
    what = "allocated between steps"
    if not head.compared:
        return "not measured between steps", [], ""
    if head.exact == head.compared:
        return EXACT, [f"{what}: to the byte, {head.exact} of {head.compared} predictions"], "good"
    if head.exact + head.as_printed == head.compared:
        return AS_PRINTED, [f"{what}: within the rounding of the log, {head.as_printed} of {head.compared} predictions"], "good"
    exact = f"{head.exact} of {head.compared} exact"
    if head.worst is None:
        return exact, [f"{what}: {exact}, to the byte"], ""
    view, line, source = head.worst
    error = signed_percent(line.errors[source])
    return exact if head.exact else error, [f"{what}: {exact}, largest error {error}, {source} of {view.label}"], error_style(line, source)


def _speed(views: Sequence[CaseView]) -> ShortAnswer:
    question = "How fast is it?"
    timed = [view for view in views if view.main.step_time_s is not None]
    fastest = min(timed, key=lambda view: view.main.step_time_s or 0.0, default=None)
    if fastest is not None:
        main = fastest.main
        details = [
            fastest.label if len(views) > 1 else "",
            f"{number(main.tokens_per_s)} tokens/s" if main.tokens_per_s is not None else "",
        ]
        details += [f"MFU {main.mfu:.1%}"] if main.mfu is not None else []
        details += [f"interquartile range {seconds(main.step_time_iqr_s)}"] if main.step_time_iqr_s is not None else []
        return ShortAnswer("speed", question, f"{seconds(main.step_time_s)} a step", tuple(details))
    bounded = [(r.step_time_floor_s, view) for view in views for r in view.records.values() if r.step_time_floor_s is not None]
    if not bounded:
        return ShortAnswer("speed", question, "not measured", ("bf16prof measure times the steps",))
    floor, view = min(bounded, key=lambda pair: pair[0])
    details = [view.label if len(views) > 1 else "", "a bound, no prediction: no step on this GPU is faster"]
    return ShortAnswer("speed", question, f"at least {seconds(floor)} a step", tuple(text for text in details if text))


def _learns(views: Sequence[CaseView]) -> ShortAnswer:
    question = "Does it learn?"
    curves = {view.label: curve for view in views if (curve := losses(view.main))}
    lost = [label for label, curve in curves.items() if any(loss is None for _, loss in curve)]
    if lost:
        return ShortAnswer(
            "learns", question, f"loss {NOT_FINITE}", (f"in {len(lost)} of {len(curves)} cases: {', '.join(lost[:3])}{more(lost)}",), "bad"
        )
    watched = [(view, found) for view in views if (found := learning(view.main))]
    worst = min(((view, found) for view, found in watched if found.edq is not None), key=lambda pair: pair[1].edq or 0.0, default=None)
    details = []
    if worst is not None:
        view, found = worst
        which = f", least of {len(watched)} cases: {view.label}" if len(watched) > 1 else ""
        details.append(f"EDQ {edq_text(found.edq)}, {lost_text(found.lost_updates)} of updates lost{which}")
    if curves:
        first = next(view for view in views if losses(view.main))
        details.insert(0, first.label if len(curves) > 1 else f"{len(curves[first.label])} steps")
        details += [] if worst else ["measure --quality 20 says what the recipe costs"]
        return ShortAnswer("learns", question, f"loss {loss_text(first.main, '→')}", tuple(details))
    known = next((view for view in views if view.main.loss is not None), None)
    if known is not None:
        return ShortAnswer("learns", question, f"loss {number(known.main.loss)}", (known.label, *details))
    return ShortAnswer("learns", question, "not measured", ("bf16prof measure --quality 20 watches the updates of the real optimizer",))
