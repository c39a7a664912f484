"""The forward passes of models as a `Tape` records them (no torch): the same operators in the same order as in the modules themselves.

Our own families (`models/modules`) lie here, one file each; transformers' model types in `tapes/huggingface`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, Protocol

from bf16prof.errors import InputError
from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.operators import cross_entropy
from bf16prof.models.autograd.tape import LOGITS, LOSS, Tape, Tensor
from bf16prof.profiles.models import HuggingFaceSettings, Model, ModelSettings
from bf16prof.reductions import USUAL_PROCESSOR, Processor


class NoTape(InputError):
    """It is not known in closed form what this model allocates; the message says why."""


@dataclass(frozen=True)
class ForwardRun:
    """What a forward pass is run on: the model, sequences of tokens, a GPU's compute capability (`None`: a CPU), the parameters' dtype,
    and the GPU as its reductions see it."""

    model: Model
    batch: int
    sequence: int
    checkpointing: bool
    capability: tuple[int, int] | None
    dtype: str
    keeps_outputs: bool = True
    """Whether the training loop still has the model's outputs in backward (`profiles/schema.py`)."""
    processor: Processor = USUAL_PROCESSOR

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.sequence


class Network(Protocol):
    """A model on a tape."""

    @property
    def kinds(self) -> Sequence[Hashable]:
        """One for every layer: layers of the same kind allocate the same."""
        ...

    @property
    def root(self) -> str:
        """The module that holds the layers."""
        ...

    @property
    def leaf(self) -> str | None:
        """The module of a layer that DeepSpeed takes as one with all that is in it, where a layer has it."""
        ...

    def loss(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """Record the forward pass with only these layers, up to the loss; marks when the loop has the logits, and when the loss."""
        ...


@functools.lru_cache(maxsize=64)
def network(run: ForwardRun) -> Network:
    """The model of a run. Raises `NoTape` saying why there is none."""
    if isinstance(run.model, ModelSettings):
        return OwnNetwork(run, run.model)
    if isinstance(run.model, HuggingFaceSettings):
        from bf16prof.models.tapes.huggingface import network_of

        return network_of(run, run.model)
    raise NoTape("only the code that builds this model knows what it computes")


@dataclass(frozen=True)
class OwnNetwork:
    """A model of our own families: the loop computes the loss of its logits."""

    run: ForwardRun
    model: ModelSettings
    root: ClassVar[str] = ""
    leaf: ClassVar[str | None] = None

    @property
    def kinds(self) -> Sequence[Hashable]:
        """All layers are alike."""
        return [""] * self.model.num_layers

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return self.model.intermediate_size or 4 * self.model.hidden_size

    def loss(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """See `Network.loss`."""
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
    return tape.cut(x, -1)
