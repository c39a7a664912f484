"""The forward passes of our own families as a `Tape` records them (no torch): the operators of
`models/modules` in their order.

They answer for these families without torch, in any size, and are what the tracer is held against.
All other models are recorded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bf16prof.models.autograd.events import BEHIND, LOGITS, LOSS
from bf16prof.models.autograd.operators import cross_entropy
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.profiles.models import Model, ModelSettings
from bf16prof.reductions import USUAL_PROCESSOR, Processor


@dataclass(frozen=True)
class ForwardRun:
    """What a forward pass is run on: the model, sequences of tokens, a GPU's compute capability
    (`None`: a CPU), the parameters' dtype, and the GPU as its reductions see it."""

    model: Model
    batch: int
    sequence: int
    checkpointing: bool
    capability: tuple[int, int] | None
    dtype: str
    keeps_outputs: bool = True
    """Whether the training loop still has the model's outputs in backward
    (`profiles/schema.py`)."""
    processor: Processor = USUAL_PROCESSOR

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class OwnNetwork:
    """A model of our own families on a tape: the loop computes the loss of its logits. All layers
    are alike."""

    run: ForwardRun

    @property
    def model(self) -> ModelSettings:
        """What it is built from."""
        assert isinstance(self.run.model, ModelSettings), "all other models are recorded"
        return self.run.model

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return self.model.intermediate_size or 4 * self.model.hidden_size

    def loss(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """Record the forward pass with only these layers, up to the loss; marks when the loop has
        the logits, and when the loss."""
        family = importlib.import_module(f"{__name__}.{self.model.family.replace('-', '_')}")
        logits = tape.module("", lambda: family.forward(tape, self, layers))
        if self.run.keeps_outputs:
            tape.keep(logits, LOGITS)
        tape.mark("logits")
        loss = cross_entropy(tape, logits)
        tape.keep(loss, LOSS)
        tape.mark("loss")
        return loss


def run_layers(tape: Tape, net: OwnNetwork, layers: Sequence[int], block: Callable[..., Tensor], x: Tensor, *extra: Tensor) -> Tensor:
    """`modules.run_layers`: the layers one after the other."""
    for layer in layers:
        x = tape.cut(x, layer)

        def call(x: Tensor, *extra: Tensor, layer: int = layer) -> Tensor:
            with tape.at_layer(layer):
                return tape.module("block", lambda x, *extra: block(tape, net, x, *extra), x, *extra)

        x = tape.checkpoint(call, x, *extra) if net.run.checkpointing else call(x, *extra)
    return tape.cut(x, BEHIND)
