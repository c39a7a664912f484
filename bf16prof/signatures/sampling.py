"""From a few recorded points to a signature of any batch and length: which points are asked for,
and what has to hold of the answers.

Every layer of a deep model at every point would take minutes. So the points are recorded with as
many layers as tell each other apart, and all layers once for each range, where each of their events
has to be one of the few's. What does not agree is left out, never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from bf16prof.cases import Job
from bf16prof.profiles.models import HuggingFaceSettings, Model
from bf16prof.reductions import Processor, processor_of
from bf16prof.signatures.folding import fold
from bf16prof.signatures.general import General, Piece, Range, UnsizedEvent
from bf16prof.signatures.happenings import Happening, happenings
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.signatures.polynomials import Fit, Point, Polynomial
from bf16prof.signatures.signature import PINS_OF, Signature

Ask = Callable[[Sequence[Inquiry]], dict[str, Signature]]
"""Records what is asked for: answers by the digest of the inquiry, without those that failed."""

SHORTEST, LONGEST, STRIDE = 256, 32768, 64
"""Lengths that are covered; where alignment matters, multiples of the stride."""
FEWEST, MOST = 2, 64
"""Batches that are covered beside that of one sequence, which is laid out in another way."""

ANY = "other batches and lengths"
"""What stands in the place of a batch and a length where it is said of what a signature is."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WINDOWS = ("sliding_window", "attention_chunk_size")
PERIODS = (
    "sliding_window_pattern",
    "full_attention_interval",
    "no_rope_layer_interval",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
)
USUAL_PERIODS = 6
"""A multiple of how often layers of a kind come again where a configuration does not say it (Gemma
3: 6)."""


@dataclass(frozen=True)
class Sample:
    """A range with the points that are recorded of the shallow model, the last of which are of
    unaligned lengths; and where the deep one is."""

    range: Range
    points: tuple[Point, ...]
    unaligned: tuple[Point, ...]
    deep: Point


def generalized(inquiry: Inquiry, ask: Ask, lengths: Sequence[int] = ()) -> General | None:
    """What holds of the inquiry's model at any batch, and at these lengths or, if none are given,
    at any; `None` if nothing was shown."""
    few = [_at_length(length) for length in lengths]
    return _of_samples(inquiry.job, few or list(_everywhere(inquiry.job)), ask, tries_all=bool(few))


def _of_samples(job: Job, samples: Sequence[Sample], ask: Ask, *, tries_all: bool) -> General | None:
    """What holds in their ranges. `tries_all`: whether, in the end, to record all layers at every
    point, which at some twenty takes too long."""
    asked = {sample.deep: Inquiry.of(_at(job, sample.deep)) for sample in samples}
    answers = ask(list(asked.values()))
    deep = {point: answers[each.digest] for point, each in asked.items() if each.digest in answers and answers[each.digest].events}
    samples = [sample for sample in samples if sample.deep in deep]
    *few_layers, all_layers = _shallow(job.profile.model)
    candidates = [*few_layers, all_layers] if tries_all or not few_layers else few_layers
    for model, more in candidates if samples else ():
        points = list(dict.fromkeys(point for sample in samples for point in (*sample.points, *sample.unaligned)))
        few = {point: Inquiry.of(_at(job, point, model)) for point in points}
        answers = ask(list(few.values()))
        known = {point: answers[each.digest] for point, each in few.items() if each.digest in answers and answers[each.digest].events}
        if (found := _general(samples, deep, known, more, processor_of(job.gpu))) is not None:
            return found
    return None


def _general(
    samples: Sequence[Sample], deep: dict[Point, Signature], known: dict[Point, Signature], more: int, processor: Processor
) -> General | None:
    """The pieces that hold, each shown once more: at its point of the deep model it gives what was
    recorded there, event by event."""
    pieces: list[Piece] = []
    whole = _bare(deep[samples[0].deep])
    for sample in samples:
        recorded = deep[sample.deep]
        piece = _sampled(sample, recorded, known, more) if _same_model(whole, recorded) else None
        again = piece and piece.at(sample.deep, processor, whole)
        if piece and again and again.events == recorded.events:
            pieces.append(piece)
    return General(whole, tuple(pieces)) if pieces else None


def _sampled(sample: Sample, deep: Signature, known: dict[Point, Signature], more: int) -> Piece | None:
    """All points, if they agree; else those of aligned lengths."""
    for points, multiple in (((*sample.points, *sample.unaligned), 1), (sample.points, STRIDE)):
        if all(point in known for point in points):
            covered = dataclasses.replace(sample.range, multiple=multiple if sample.unaligned else 1)
            piece = _fitted(covered, {point: known[point] for point in points}, sample.deep, deep, more)
            if piece is not None:
                return piece
    return None


def _fitted(covered: Range, known: dict[Point, Signature], at: Point, deep: Signature, more: int) -> Piece | None:
    fit, signatures = Fit(list(known)), list(known.values())
    passes = [happenings(each) for each in signatures]
    if not (fit.is_confirmed or covered.is_one_point) or not _same_structure(signatures, passes):
        return None
    if (runs := fold(happenings(deep), happenings(known[at]), more)) is None:
        return None
    table = _Table(fit)
    try:
        steps = tuple(_step(table, every) for every in zip(*passes, strict=True))
        outputs = [(name, table.number(sizes)) for (name, _), sizes in zip(signatures[0].outputs, _columns(signatures), strict=True)]
        loss = table.number([each.loss_bytes for each in signatures])
    except NoPolynomialError:
        return None
    pins = tuple(each.pin for each in happenings(deep) if each.kind in PINS_OF)
    return Piece(covered, table.polynomials, table.calls, steps, tuple(runs), pins, tuple(outputs), loss)


def _columns(signatures: Sequence[Signature]) -> Iterator[list[int]]:
    for every in zip(*(each.outputs for each in signatures), strict=True):
        yield [size for _, size in every]


class NoPolynomialError(Exception):
    """Points disagree."""


class _Table:
    """Every polynomial and every call once."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._numbers: dict[tuple[int, ...], int] = {}
        self._polynomials: dict[Polynomial, int] = {}
        self._calls: dict[tuple[str, tuple[int, ...]], int] = {}

    @property
    def polynomials(self) -> tuple[Polynomial, ...]:
        return tuple(self._polynomials)

    @property
    def calls(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple(self._calls)

    def number(self, values: Sequence[int]) -> int:
        """The number of the polynomial that has these values."""
        key = tuple(values)
        if key not in self._numbers:
            found = self._fit.through(key)
            if found is None:
                raise NoPolynomialError
            self._numbers[key] = self._polynomials.setdefault(found, len(self._polynomials))
        return self._numbers[key]

    def call(self, kernel: str, numbers: Sequence[tuple[int, ...]]) -> int:
        """The number of the call of a kernel with these numbers at the points."""
        key = kernel, tuple(self.number(values) for values in zip(*numbers, strict=True))
        return self._calls.setdefault(key, len(self._calls))


def _step(table: _Table, every: Sequence[Happening]) -> UnsizedEvent:
    kind, name, label, size, call, _ = every[0]
    if call is None:
        return UnsizedEvent(kind, name, label, table.number([each.size for each in every]), None)
    return UnsizedEvent(kind, name, label, size, table.call(call.kernel, [each.call.numbers for each in every if each.call]))


def _same_structure(signatures: Sequence[Signature], passes: Sequence[Sequence[Happening]]) -> bool:
    """Whether the same happens at all points, in other sizes."""
    first, bare = passes[0], _bare(signatures[0])
    same_model = all(_same_model(bare, _bare(each)) and [n for n, _ in each.outputs] == [n for n, _ in bare.outputs] for each in signatures)
    return same_model and all(len(each) == len(first) and all(map(_alike, first, each)) for each in passes)


def _alike(one: Happening, other: Happening) -> bool:
    if (one.kind, one.name, one.label, one.pin) != (other.kind, other.name, other.label, other.pin):
        return False
    if one.call is None or other.call is None:
        return one.call is other.call
    return (one.size, one.call.kernel, len(one.call.numbers)) == (other.size, other.call.kernel, len(other.call.numbers))


def _bare(signature: Signature) -> Signature:
    """Without what depends on batch and length."""
    family, _, *more = signature.about.split(", ")
    return dataclasses.replace(signature, events=(), calls={}, silent=(), about=", ".join([family, ANY, *more]))


def _same_model(one: Signature, other: Signature) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("parameters", "held", "modules", "building"))


def _at(job: Job, point: Point, model: Model | None = None) -> Job:
    batch, length = point
    workload = job.profile.workload.model_copy(update={"micro_batch_size": batch, "sequence_length": length})
    profile = job.profile.model_copy(update={"workload": workload, "model": model or job.profile.model})
    return dataclasses.replace(job, profile=profile)


def folded(inquiry: Inquiry, ask: Ask) -> General | None:
    """The answer at the inquiry's point, with each of the layers that do the same once."""
    batch, length = inquiry.point
    sample = Sample(Range((batch, batch), (length, length), 1), (inquiry.point,), (), inquiry.point)
    return _of_samples(inquiry.job, [sample], ask, tries_all=True)


def is_same_in_fp16(general: General, inquiry: Inquiry, ask: Ask) -> bool:
    """Whether all layers do in fp16 what is known of them in bf16: recorded where all layers were
    (the inquiry is one in fp16)."""
    points = [sample.deep for sample in _everywhere(inquiry.job)]
    asked = {point: Inquiry.of(_at(inquiry.job, point)) for point in points if any(point in piece.range for piece in general.pieces)}
    answers, processor = ask(list(asked.values())), processor_of(inquiry.job.gpu)
    return bool(asked) and all(
        (found := answers.get(each.digest)) is not None
        and (known := general.at(point, processor)) is not None
        and _same_model(found, known)
        and (found.events, found.outputs, found.loss_bytes) == (known.events, known.outputs, known.loss_bytes)
        for point, each in asked.items()
    )


def _at_length(length: int) -> Sample:
    """One length: more sequences than one, of which three tell that they are all alike."""
    middle = FEWEST + 1
    points = tuple((batch, length) for batch in (FEWEST, middle, MOST))
    return Sample(Range((FEWEST, MOST), (length, length), 1), points, (), (middle, length))


def _everywhere(job: Job) -> Iterator[Sample]:
    """All lengths, cut where a configuration says that attention changes."""
    limit = job.profile.model.longest_sequence
    longest = min(LONGEST, limit[1] if limit else LONGEST) // STRIDE * STRIDE
    windows = sorted({value for key, value in _numbers(job.profile.model) if key in WINDOWS and SHORTEST < value < longest})
    # Lengths are multiples of the stride, whatever the windows are: else all of a range would be
    # alike in what kernels round up to.
    starts = (SHORTEST, *(window // STRIDE * STRIDE + STRIDE for window in windows))
    stops = (*(window // STRIDE * STRIDE for window in windows), longest)
    for start, stop in zip(starts, stops, strict=True):
        yield from _between(start, stop)


def _between(start: int, stop: int) -> Iterator[Sample]:
    steps = (stop - start) // STRIDE
    if steps < 4:
        return
    first, low, middle, high, last = (
        start + STRIDE * place for place in (0, max(1, steps // 11), max(2, steps // 5), steps * 2 // 3, steps)
    )
    odd = (low + middle) // 2 | 1
    ends = [(batch, length) for length in (first, middle, last) for batch in (FEWEST, MOST)]
    many = (*ends, (3, low), (5, high))
    yield Sample(Range((FEWEST, MOST), (start, stop), 1), many, ((4, odd),), (3, low))
    one = tuple((1, length) for length in (first, low, middle, high, last))
    yield Sample(Range((1, 1), (start, stop), 1), one, ((1, odd),), (1, low))


def _shallow(model: Model) -> Iterator[tuple[Model, int]]:
    """The model with fewer layers, and how many: for each number of them after which layers may
    come again, the smallest first."""
    if not isinstance(model, HuggingFaceSettings):
        yield model, 0
        return
    content, text = model.hf_config, model.text
    key = next((key for key in LAYERS if isinstance(text.get(key), int)), None)
    if key is None:
        yield model, 0
        return
    layers, lists = text[key], {name: value for name, value in text.items() if isinstance(value, list) and len(value) == text[key]}
    said = lcm(*(_period(value) for value in lists.values()), *(text[name] for name in PERIODS if isinstance(text.get(name), int)))
    for period in dict.fromkeys((said, lcm(said, USUAL_PERIODS))):
        left = 2 * period + 2 + (layers - 2) % period if layers > 2 else layers
        if left < layers:
            few = {**text, key: left, **{name: value[:left] for name, value in lists.items()}}
            changed = {**content, "text_config": few} if text is not content else few
            yield type(model).model_validate({**model.model_dump(), "hf_config": changed}), (layers - left) // period
    yield model, 0


def _period(values: Sequence[Any]) -> int:
    """After how many layers a list repeats itself, but for its beginning."""
    count = len(values)
    return next((p for p in range(1, count) if list(values[-2 * p :]) == list(values[-p:]) * 2 and 2 * p <= count), 1)


def _numbers(model: Model) -> Iterator[tuple[str, int]]:
    """The whole numbers that a configuration names."""
    found = model.hf_config if isinstance(model, HuggingFaceSettings) else {}
    for part in (found, found.get("text_config")):
        if isinstance(part, dict):
            yield from ((key, value) for key, value in part.items() if type(value) is int)
