"""A model's memory signature: its parameters and buffers, and the events of one forward and
backward pass (`models.autograd.events`).

Names in it are whole (`NO_LAYER`), so that two lists of layers cannot be mixed up. Nothing in it
depends on a ZeRO stage below 3, on a number of ranks, or on an optimizer: those are the business of
`closed_form`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from bf16prof.errors import InputError
from bf16prof.kernels import KernelCall
from bf16prof.models.autograd.events import NO_LAYER, Event, ParameterKey
from bf16prof.models.shapes import ParameterSpec
from bf16prof.vocabulary import Component, Label

FORMAT = 1
"""Counted up when the form of the file changes."""

PINS_OF = ("pin", "unpin")


@dataclass(frozen=True)
class HeldTensor:
    """A storage that the model holds beside its parameters: bytes, and whether
    `nn.Module.buffers()` knows it."""

    name: str
    bytes: int
    is_registered: bool


@dataclass(frozen=True)
class Called:
    """A module with ZeRO-3's hooks: the parameters that it fetches, by name; a leaf is fetched with
    all that is in it."""

    name: str
    parameters: tuple[str, ...]
    is_leaf: bool = False


class SilentCall(NamedTuple):
    """A call of a kernel that asked for no scratch on this batch and length: the number of events
    before it, and what scratch would be."""

    place: int
    label: Label
    call: KernelCall


@dataclass(frozen=True, eq=False)
class Signature:
    """What was recorded.

    * `outputs`: what the training loop holds of a micro-batch, by its local variable: bytes of the
      outputs; `loss_bytes`: of the loss.
    * `building`: on CPU ranks, how high memory goes while the model is built and cast, and what is
      left of it then.
    * `problem`: why there are no events, though the model could be built; empty if there are.
    * `calls`: of events that are scratch of a CUDA kernel, by their place, the call that asked for
      it; `silent`: calls that asked for none.
    * `versions`: of the packages whose code was run. `about`: what was asked, in a few words.
    """

    parameters: tuple[ParameterSpec, ...]
    held: tuple[HeldTensor, ...]
    modules: tuple[Called, ...]
    outputs: tuple[tuple[str, int], ...]
    loss_bytes: int
    events: tuple[Event, ...]
    building: tuple[int, int]
    problem: str
    versions: dict[str, str]
    about: str = ""
    calls: Mapping[int, KernelCall] = field(default_factory=dict)
    silent: tuple[SilentCall, ...] = ()

    def packed(self) -> bytes:
        """As a compressed file; the same for the same signature."""
        return packed(plain(self))

    @classmethod
    def unpacked(cls, content: bytes) -> Signature:
        """From such a file. Raises `InputError` for anything else."""
        return unpacked(content, signature_of)


T = TypeVar("T")


def packed(content: object) -> bytes:
    """Plain content as a compressed file; the same for the same content."""
    return gzip.compress(json.dumps(content, separators=(",", ":"), allow_nan=False).encode(), 6, mtime=0)


def unpacked(content: bytes, made: Callable[[dict[str, Any]], T]) -> T:
    """What is made of the content of such a file. Raises `InputError` for anything else."""
    try:
        return made(json.loads(gzip.decompress(content)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"not a signature: {type(error).__name__}") from error


def plain(signature: Signature) -> dict[str, Any]:
    """As JSON has it: names once, events as columns of numbers."""
    names: dict[str, int] = {}
    kinds: dict[str, int] = {}
    labels: dict[Label, int] = {}
    rows = [_row(event, names, kinds, labels) for event in signature.events]
    return {
        "format": FORMAT,
        "parameters": [[p.name, list(p.shape), p.layer, p.tied, list(p.also), p.trainable] for p in signature.parameters],
        "held": [[h.name, h.bytes, h.is_registered] for h in signature.held],
        "modules": [[m.name, list(m.parameters), m.is_leaf] for m in signature.modules],
        "outputs": [list(each) for each in signature.outputs],
        "loss_bytes": signature.loss_bytes,
        "building": list(signature.building),
        "problem": signature.problem,
        "versions": signature.versions,
        "about": signature.about,
        "names": list(names),
        "kinds": list(kinds),
        "labels": [[component, name] for component, name in labels],
        "events": [list(column) for column in zip(*rows, strict=True)],
        "calls": _plain_calls(list(signature.calls.items())),
        "silent": [
            [[component, name] for _, (component, name), _ in signature.silent],
            _plain_calls([(p, c) for p, _, c in signature.silent]),
        ],
    }


def _row(event: Event, names: dict[str, int], kinds: dict[str, int], labels: dict[Label, int]) -> tuple[int, int, int, int]:
    """Kind, subject, number of a pin, bytes."""
    kind, subject, size = event
    number = 0
    if kind == "memory":
        place = labels.setdefault(subject, len(labels))
    elif kind in PINS_OF:
        (_, name), number = subject
        place = names.setdefault(name, len(names))
    elif kind == "compute":
        place = names.setdefault(subject, len(names))
    else:
        place = -1 if subject is None else names.setdefault(subject[1], len(names))
    return kinds.setdefault(kind, len(kinds)), place, number, size


def _plain_calls(calls: Sequence[tuple[int, KernelCall]]) -> list[Any]:
    """Each call once, and where it is."""
    distinct = {call: number for number, call in enumerate(dict.fromkeys(call for _, call in calls))}
    return [[[call.kernel, *call.numbers] for call in distinct], [[place, distinct[call]] for place, call in calls]]


def _calls(found: list[Any] | None) -> Iterator[tuple[int, KernelCall]]:
    if found is not None:  # files from before calls were recorded have none
        distinct = [KernelCall(kernel, tuple(numbers)) for kernel, *numbers in found[0]]
        yield from ((place, distinct[number]) for place, number in found[1])


def _silent(labels: Sequence[Any], calls: list[Any] | None) -> Iterator[SilentCall]:
    for (component, name), (place, call) in zip(labels, _calls(calls), strict=True):
        yield SilentCall(place, (Component(component), name), call)


def signature_of(found: dict[str, Any]) -> Signature:
    """From what JSON has of it."""
    if found["format"] != FORMAT:
        raise ValueError("another format")
    return Signature(
        parameters=tuple(
            ParameterSpec(name, tuple(shape), layer, tied, tuple(also), trainable)
            for name, shape, layer, tied, also, trainable in found["parameters"]
        ),
        held=tuple(HeldTensor(*each) for each in found["held"]),
        modules=tuple(Called(name, tuple(parameters), is_leaf) for name, parameters, is_leaf in found["modules"]),
        outputs=tuple((name, size) for name, size in found["outputs"]),
        loss_bytes=found["loss_bytes"],
        events=tuple(_events(found)),
        building=(found["building"][0], found["building"][1]),
        problem=found["problem"],
        versions=dict(found["versions"]),
        about=found["about"],
        calls=dict(_calls(found.get("calls"))),
        silent=tuple(_silent(*found.get("silent", ((), None)))),
    )


def _events(found: dict[str, Any]) -> Sequence[Event]:
    names: list[str] = found["names"]
    kinds: list[str] = found["kinds"]
    labels = [(Component(component), name) for component, name in found["labels"]]
    keys = [ParameterKey(NO_LAYER, name) for name in names]
    events = []
    for kind_number, place, number, size in zip(*found["events"], strict=True):
        kind = kinds[kind_number]
        subject: Any = None
        if kind == "memory":
            subject = labels[place]
        elif kind == "compute":
            subject = names[place]
        elif kind in PINS_OF:
            subject = keys[place], number
        elif place >= 0:
            subject = keys[place]
        events.append(Event(kind, subject, size))
    return events
