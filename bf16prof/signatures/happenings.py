"""The events of a recorded pass as it takes to compare passes: of other batches and lengths, and of
models with fewer layers."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, NamedTuple

from bf16prof.kernels import KernelCall
from bf16prof.models.autograd.events import Event
from bf16prof.signatures.signature import PINS_OF, Signature
from bf16prof.vocabulary import Label

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Happening(NamedTuple):
    """An event with what its size follows from: bytes or operations, or a kernel's call, whose
    scratch begins (1) or ends (-1)."""

    kind: str
    name: str
    """Of the module or parameter; what is computed; empty of everything else."""
    label: Label | None
    size: int
    call: KernelCall | None = None
    pin: int = 0

    def regardless_of_layer(self) -> Hashable:
        """What is the same of events of like layers."""
        return self.kind, _NUMBER.sub("#", self.name, count=1), self.label, self.size, self.call


def happenings(signature: Signature) -> list[Happening]:
    """The events of a recorded pass, those of kernels that asked for nothing included."""
    found: list[Happening] = []
    silent = iter(signature.silent)
    quiet = next(silent, None)
    for index, (kind, subject, size) in enumerate((*signature.events, Event("", None, 0))):
        while quiet is not None and quiet.place == index:
            found += [Happening("memory", "", quiet.label, sign, quiet.call) for sign in (1, -1)]
            quiet = next(silent, None)
        if kind == "memory":
            call = signature.calls.get(index)
            sign = 1 if size > 0 else -1
            found.append(Happening(kind, "", subject, sign, call) if call else Happening(kind, "", subject, size))
        elif kind in PINS_OF:
            found.append(Happening(kind, subject[0][1], None, size, pin=subject[1]))
        elif kind:
            found.append(Happening(kind, _name(subject), None, size))
    return found


def _name(subject: Any) -> str:
    return "" if subject is None else subject if isinstance(subject, str) else str(subject[1])


def number_of(name: str) -> int | None:
    """The number of the layer that a name has in it."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def further(name: str, layers: int) -> str:
    """The same of a layer so many further on."""
    return _NUMBER.sub(lambda found: str(int(found[0]) + layers), name, count=1) if layers else name
