"""What all causal language models of transformers have in common: from the token ids through the layers to the loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bf16prof.models.autograd.operators import FP32, TOKEN_BYTES, cast, cross_entropy, embedding, linear
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.shapes.huggingface.config import Config
from bf16prof.models.tapes import Run

Layer = Callable[[int, Tensor], Tensor]
"""From a layer's number and its input to its output."""


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A model: its run, its configuration, and whether attention is eager, not sdpa. A model type is a class that says what differs.

    * `root`, `tokens`: the module below the output head, and the token embedding in it.
    * `defaults`: what its configuration class says of the keys that only tapes read.
    """

    run: Run
    config: Config
    is_eager: bool

    root: ClassVar[str] = "model"
    tokens: ClassVar[str] = "embed_tokens"
    layers: ClassVar[str] = "num_hidden_layers"
    defaults: ClassVar[Mapping[str, Any]] = {}

    @property
    def kinds(self) -> Sequence[Hashable]:
        """See `Network.kinds`."""
        return ["" for _ in self.config.layers(self.layers)]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.config.count("hidden_size")

    def loss(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """See `Network.loss`: logits and loss come back together."""
        loss = tape.module("", lambda: self._forward(tape, layers))
        tape.mark("logits")
        tape.mark("loss")
        return loss

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """From the token ids to the input of the output head."""
        raise NotImplementedError

    def logits(self, tape: Tape, x: Tensor) -> Tensor:
        """The output head, whose weight may be the embedding's."""
        name = f"{self.root}.{self.tokens}.weight" if self.config.flag("tie_word_embeddings") else "lm_head.weight"
        weight = tape.parameter(name, self.config.count("vocab_size") * self.hidden)
        return tape.module("lm_head", lambda x: linear(tape, x, weight, None, self.hidden), x)

    def embedded(self, tape: Tape) -> Tensor:
        """The embeddings of the token ids."""
        name, width = f"{self.root}.{self.tokens}", self.hidden
        table = tape.parameter(f"{name}.weight", self.config.count("vocab_size") * width)
        return tape.module(name, lambda: embedding(tape, table, self.run.tokens, width))

    def through(self, tape: Tape, layers: Sequence[int], x: Tensor, forward: Layer) -> Tensor:
        """The layers one after the other (`GradientCheckpointingLayer`: checkpointing is inside of the module's hooks)."""
        for layer in layers:
            x = tape.cut(x, layer)

            def call(x: Tensor, layer: int = layer) -> Tensor:
                with tape.at_layer(layer):
                    return forward(layer, x)

            with tape.at_layer(layer):
                x = tape.module("block", lambda x, call=call: tape.checkpoint(call, x) if self.run.checkpointing else call(x), x)
        return tape.cut(x, -1)

    def _forward(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        hidden = tape.module(self.root, lambda: self.body(tape, layers))
        logits = self.logits(tape, hidden)
        tape.keep(logits)
        return self._causal_lm_loss(tape, logits)

    def _causal_lm_loss(self, tape: Tape, logits: Tensor) -> Tensor:
        """`ForCausalLMLoss` (loss/loss_utils.py): in fp32, with labels that are padded and shifted."""
        logits = cast(tape, logits, FP32)
        labels = tape.new(self.run.batch * (self.run.sequence + 1), TOKEN_BYTES, "constant_pad_nd")
        shifted = tape.new(self.run.tokens, TOKEN_BYTES, "clone")
        loss = cross_entropy(tape, logits, shifted)
        del labels
        return loss
