"""The forward passes of the model families as a `Tape` records them (no torch): the same operators in the same order as in `modules`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.profiles.models import ModelSettings


@dataclass(frozen=True)
class Run:
    """What a forward pass is run on: the model, sequences of tokens, and a GPU's compute capability (`None`: a CPU)."""

    model: ModelSettings
    batch: int
    sequence: int
    checkpointing: bool
    capability: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.sequence

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return self.model.intermediate_size or 4 * self.model.hidden_size


def forward(tape: Tape, run: Run, layers: int) -> Tensor:
    """Record the forward pass of the model's family with so many layers; its logits."""
    family = importlib.import_module(f"{__name__}.{run.model.family.replace('-', '_')}")
    logits: Tensor = tape.module("", lambda: family.forward(tape, run, layers))
    return logits


def run_layers(tape: Tape, run: Run, layers: int, block: Callable[..., Tensor], x: Tensor, *extra: Tensor) -> Tensor:
    """`modules.run_layers`: the layers one after the other."""
    for layer in range(layers):
        x = tape.cut(x, layer)

        def call(x: Tensor, *extra: Tensor, layer: int = layer) -> Tensor:
            outer, tape.layer = tape.layer, layer
            try:
                return tape.module("block", lambda x, *extra: block(tape, run, x, *extra), x, *extra)
            finally:
                tape.layer = outer

        x = tape.checkpoint(call, x, *extra) if run.checkpointing else call(x, *extra)
    return tape.cut(x, layers)
