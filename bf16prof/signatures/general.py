"""Signatures of any batch and length: events whose sizes are polynomials, within the range that
recorded points have confirmed.

A size that is no polynomial, a kernel's scratch, is computed anew from the numbers of its call,
which are (`bf16prof.kernels`).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from bf16prof.kernels import KernelCall, scratch_bytes
from bf16prof.models.autograd.events import NO_LAYER, Event, ParameterKey
from bf16prof.reductions import Processor
from bf16prof.signatures.happenings import further
from bf16prof.signatures.polynomials import Point, Polynomial
from bf16prof.signatures.signature import PINS_OF, Signature, packed, plain, signature_of, unpacked
from bf16prof.vocabulary import Component, Label

FORMAT = 1
"""Counted up when the form of the file changes."""


class UnsizedEvent(NamedTuple):
    """An event without its size: `size` is the number of the polynomial that has it; or `call` that
    of the call whose scratch begins (`size` 1) or ends (-1)."""

    kind: str
    name: str
    label: Label | None
    size: int
    call: int | None


class Stretch(NamedTuple):
    """The steps from `start` on up to `stop`, so many layers further on."""

    start: int
    stop: int
    layers: int


@dataclass(frozen=True)
class Range:
    """Batches and lengths from the smallest to the largest that were recorded; lengths that are
    multiples of a number."""

    batches: tuple[int, int]
    lengths: tuple[int, int]
    multiple: int

    @property
    def is_one_point(self) -> bool:
        """Whether one batch and one length is all that is in it."""
        return self.batches[0] == self.batches[1] and self.lengths[0] == self.lengths[1]

    def __contains__(self, point: Point) -> bool:
        (fewest, most), (shortest, longest), (batch, length) = self.batches, self.lengths, point
        return fewest <= batch <= most and shortest <= length <= longest and length % self.multiple == 0


@dataclass(frozen=True, eq=False)
class Piece:
    """What holds within a range. `runs` says which steps come in which order, `pins` the numbers of
    pins in theirs."""

    range: Range
    polynomials: tuple[Polynomial, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    """Kernels, and the polynomials that have the numbers of the call."""
    steps: tuple[UnsizedEvent, ...]
    runs: tuple[Stretch, ...]
    pins: tuple[int, ...]
    outputs: tuple[tuple[str, int], ...]
    loss: int
    """The polynomial that has the bytes of the loss."""

    @functools.cached_property
    def _order(self) -> list[tuple[int, str, Any]]:
        """Every event: its step, its kind, and its subject."""
        pins = iter(self.pins)
        found: list[tuple[int, str, Any]] = []
        for run in self.runs:
            for place in range(run.start, run.stop):
                kind, name, label, _, _ = self.steps[place]
                found.append((place, kind, label if kind == "memory" else _subject(kind, further(name, run.layers), pins)))
        return found

    def at(self, point: Point, processor: Processor, whole: Signature) -> Signature | None:
        """The signature at a point of the range, on a GPU with such a processor; `None` where
        something is no whole number."""
        values = [polynomial(point) for polynomial in self.polynomials]
        if None in values:
            return None
        known: list[int] = [value for value in values if value is not None]
        scratch = [scratch_bytes(KernelCall(kernel, tuple(known[n] for n in numbers)), processor) for kernel, numbers in self.calls]
        sizes = [known[step.size] if step.call is None else step.size * scratch[step.call] for step in self.steps]
        events = tuple(Event(kind, subject, sizes[place]) for place, kind, subject in self._order if kind != "memory" or sizes[place])
        outputs = tuple((name, known[number]) for name, number in self.outputs)
        return dataclasses.replace(whole, events=events, outputs=outputs, loss_bytes=known[self.loss])


def _subject(kind: str, name: str, pins: Any) -> Any:
    if kind in PINS_OF:
        return ParameterKey(NO_LAYER, name), next(pins)
    if kind == "compute":
        return name
    return None if kind in WITHOUT_SUBJECT else ParameterKey(NO_LAYER, name)


WITHOUT_SUBJECT = ("logits", "loss", "backward")


@dataclass(frozen=True, eq=False)
class General:
    """A model's pieces, and what is the same everywhere: a signature without events.

    `is_that_of_fp16`: whether one in bf16 was recorded in fp16 as well, in all layers in every
    range, and the same happened. Elements are as large, but some models' code looks at the dtype.
    """

    whole: Signature
    pieces: tuple[Piece, ...]
    is_that_of_fp16: bool = False

    @property
    def events(self) -> int:
        """Events of a pass, but for scratch that is not asked for everywhere."""
        return max((sum(run.stop - run.start for run in piece.runs) for piece in self.pieces), default=0)

    def at(self, point: Point, processor: Processor) -> Signature | None:
        """The signature at a point, if it lies in a piece's range."""
        for piece in self.pieces:
            if point in piece.range and (found := piece.at(point, processor, self.whole)) is not None:
                return found
        return None

    def reach(self, point: Point, axis: int) -> int:
        """Up to which batch (0) or length (1) all is known from a point on, the other staying as it
        is."""
        found = point[axis]
        ranges = [(each.range.batches, each.range.lengths) for each in self.pieces if each.range.multiple == 1]
        for ends in sorted(ranges, key=lambda each: each[axis]):
            (first, last), (least, most) = ends[axis], ends[1 - axis]
            if least <= point[1 - axis] <= most and first <= found + 1 and last > found:
                found = last
        return found

    def packed(self) -> bytes:
        """As a compressed file; the same for the same content."""
        content = {"format": FORMAT, "whole": plain(self.whole), "pieces": [_plain_piece(piece) for piece in self.pieces]}
        return packed(content | {"is_that_of_fp16": True} if self.is_that_of_fp16 else content)

    @classmethod
    def unpacked(cls, content: bytes) -> General:
        """From such a file. Raises `InputError` for anything else."""
        return unpacked(content, _general)


def _general(found: dict[str, Any]) -> General:
    if found["format"] != FORMAT:
        raise ValueError("another format")
    return General(signature_of(found["whole"]), tuple(_piece(each) for each in found["pieces"]), found.get("is_that_of_fp16", False))


def _plain_piece(piece: Piece) -> dict[str, Any]:
    kinds, names, labels = (
        {each: n for n, each in enumerate(dict.fromkeys(every))} for every in zip(*(s[:3] for s in piece.steps), strict=True)
    )
    return {
        "range": [list(piece.range.batches), list(piece.range.lengths), piece.range.multiple],
        "polynomials": [[each.divisor, *each.terms] for each in piece.polynomials],
        "calls": [[kernel, *numbers] for kernel, numbers in piece.calls],
        "kinds": list(kinds),
        "names": list(names),
        "labels": [label and list(label) for label in labels],
        "steps": [
            [column[each] for each in every]
            for column, every in zip((kinds, names, labels), zip(*(s[:3] for s in piece.steps), strict=True), strict=True)
        ] + [[step.size for step in piece.steps], [step.call for step in piece.steps]],
        "runs": [list(run) for run in piece.runs],
        "pins": list(piece.pins),
        "outputs": [list(each) for each in piece.outputs],
        "loss": piece.loss,
    }  # fmt: skip


def _piece(found: dict[str, Any]) -> Piece:
    labels = [label and (Component(label[0]), label[1]) for label in found["labels"]]
    (fewest, most), (shortest, longest), multiple = found["range"]
    return Piece(
        Range((fewest, most), (shortest, longest), multiple),
        tuple(Polynomial(tuple(terms), divisor) for divisor, *terms in found["polynomials"]),
        tuple((kernel, tuple(numbers)) for kernel, *numbers in found["calls"]),
        tuple(
            UnsizedEvent(found["kinds"][kind], found["names"][name], labels[label], size, call)
            for kind, name, label, size, call in zip(*found["steps"], strict=True)
        ),
        tuple(Stretch(*each) for each in found["runs"]),
        tuple(found["pins"]),
        tuple((name, number) for name, number in found["outputs"]),
        found["loss"],
    )
