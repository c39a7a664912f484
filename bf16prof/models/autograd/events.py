"""What happens in a forward and backward pass, as events: a `Tape` writes them, a tracer records
them, the closed form walks them.

| kind | subject | bytes |
|---|---|---|
| `memory` | the label of a storage | that it takes (above 0) or gives back (below 0) |
| `gradient` | the parameter | of its gradient, which belongs to the engine from now on |
| `fetch`, `release`, `fetch backward`, `release backward` | the module whose ZeRO-3 hook runs | 0 |
| `pin`, `unpin` | the parameter, and the number of a view of it that autograd holds | 0 |
| `compute` | the part of the micro-step | operations of a matrix product (no bytes) |
| `logits`, `loss`, `backward` | none: the loop has its outputs, has its loss, starts backward | 0 |
| `cut` | the section that begins (`SectionKey`), on tapes only | 0 |
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bf16prof.vocabulary import Component, Label

GRADIENT: Label = (Component.GRADIENTS, "parameter gradients")

BY_THE_LOOP = " kept by the training loop"


def local_variable(name: str) -> Label:
    """A tensor that the training loop holds in a local variable until it has a new one."""
    return Component.ACTIVATIONS, name + BY_THE_LOOP


LOGITS, LOSS = local_variable("logits"), local_variable("loss")

RECOMPUTED = "recomputed"
"""What operations are part of that run again in backward; others are part of the phase."""

NO_LAYER = -1
"""The layer of what is outside the layers, and of all of a recorded model, whose names are
whole."""


class ParameterKey(NamedTuple):
    """What events call a parameter, or a module: its layer, and its name inside it.
    `h.3.attn.weight` is layer 3, `attn.weight`."""

    layer: int
    name: str

    @classmethod
    def of(cls, name: str) -> ParameterKey:
        """From a whole name."""
        parts = name.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        return cls(NO_LAYER, name) if place is None else cls(int(parts[place]), ".".join(parts[place + 1 :]))

    def shifted(self, layers: int) -> ParameterKey:
        """The same so many layers further on."""
        return self if self.layer == NO_LAYER else ParameterKey(self.layer + layers, self.name)


BEFORE, BEHIND = "before the layers", "behind the layers"
"""The places of sections that are no layer's."""


class SectionKey(NamedTuple):
    """A section of a tape, which begins at a cut: `forward`, `backward` or `forget` (autocast's
    casts of weights), and a layer or one of `BEFORE` and `BEHIND`."""

    kind: str
    place: int | str


class Event(NamedTuple):
    """One event (see the table above)."""

    kind: str
    subject: Any
    bytes: int
