"""What all causal language models of transformers have in common: from the token ids through the layers to the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.operators import FP32, TOKEN_BYTES, cast, cross_entropy, embedding, linear
from bf16prof.models.autograd.tape import LOGITS, LOSS, Tape, Tensor
from bf16prof.models.shapes.huggingface import BufferSpec
from bf16prof.models.shapes.huggingface.config import Config, shown
from bf16prof.models.tapes import ForwardRun, NoTape
from bf16prof.models.tapes.huggingface.blocks import additive_mask, boolean_mask, needs_mask

Outputs = Tensor | tuple[Tensor, Tensor | None]
Layer = Callable[[Tensor], Outputs]
"""From a layer's input to its output, which other tensors may accompany."""


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A model: its run, its configuration, whether attention is eager, not sdpa, and its buffers.

    A model type is a class that says what differs:

    * `root`, `tokens`: the module below the output head, and the token embedding in it.
    * `has_sdpa`: whether transformers lets its attention be sdpa's, which is then its choice.
    * `defaults`: what its configuration class says of the keys that only tapes read.
    """

    run: ForwardRun
    config: Config
    is_eager: bool
    buffers: Sequence[BufferSpec]

    root: ClassVar[str] = "model"
    leaf: ClassVar[str | None] = None
    tokens: ClassVar[str] = "embed_tokens"
    layers: ClassVar[str] = "num_hidden_layers"
    has_head_bias: ClassVar[bool] = False
    has_sdpa: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {}

    @property
    def kinds(self) -> Sequence[Hashable]:
        """See `Network.kinds`."""
        return ["" for _ in self.config.layers(self.layers)]

    def share(self, key: str) -> float:
        """A share that is dropped; `null` drops nothing."""
        value = self.config.values.get(key) or 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise NoTape(f"model.hf_config.{key}: expected a share, got {shown(value)}")
        return float(value)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.config.count("hidden_size")

    @property
    def turned(self) -> int:
        """Dimensions of each head that rotary positions turn: two for every frequency."""
        return 2 * next(each.numel for each in self.buffers if each.name.endswith("inv_freq"))

    def masks(self, tape: Tape, windows: Sequence[int | None], width: int) -> Mapping[int | None, Tensor | None]:
        """The masks by the windows that they leave open, of embeddings of that width: sdpa does without where it can."""
        different = dict.fromkeys(windows)
        if self.is_eager:
            return {window: additive_mask(tape, self.run, window, width) for window in different}
        return {window: boolean_mask(tape, self.run, window) if needs_mask(self.run, window) else None for window in different}

    def loss(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """See `Network.loss`: logits and loss come back together."""
        loss = tape.module("", lambda: self._forward(tape, layers))
        tape.keep(loss, LOSS)
        tape.mark("logits")
        tape.mark("loss")
        return loss

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """From the token ids to the input of the output head."""
        raise NotImplementedError

    def logits(self, tape: Tape, x: Tensor) -> Tensor:
        """The output head, whose weight may be the embedding's."""
        return self.head(tape, x, self.hidden)

    def head(self, tape: Tape, x: Tensor, width: int) -> Tensor:
        """`lm_head`, of inputs of that width."""
        name = f"{self.root}.{self.tokens}.weight" if self.config.flag("tie_word_embeddings") else "lm_head.weight"
        vocabulary = self.config.count("vocab_size")
        weight = tape.parameter(name, vocabulary * width)
        bias = tape.parameter("lm_head.bias", vocabulary) if self.has_head_bias else None
        return tape.module("lm_head", lambda x: linear(tape, x, weight, bias, width), x)

    def embedded(self, tape: Tape, width: int) -> Tensor:
        """The embeddings of the token ids."""
        name = f"{self.root}.{self.tokens}"
        table = tape.parameter(f"{name}.weight", self.config.count("vocab_size") * width)
        return tape.module(name, lambda: embedding(tape, table, self.run.tokens, width))

    def through(self, tape: Tape, layers: Sequence[int], x: Tensor, forward: Callable[[int], Layer]) -> Tensor:
        """The layers one after the other (`GradientCheckpointingLayer`: checkpointing is inside of the module's hooks).

        What else a layer gives, such as its attention weights, is held until the next layer is over.
        """
        for layer in layers:
            x = tape.cut(x, layer)
            call = functools.partial(_at_layer, tape, layer, forward(layer))
            run = functools.partial(tape.checkpoint, call) if self.run.checkpointing else call
            with tape.at_layer(layer):
                outputs = tape.module("block", run, x)
            x = outputs[0] if isinstance(outputs, tuple) else outputs
        return tape.cut(x, -1)

    def _forward(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        hidden = tape.module(self.root, lambda: self.body(tape, layers))
        logits = self.logits(tape, hidden)
        if self.run.keeps_outputs:
            tape.keep(logits, LOGITS)
        return self._causal_lm_loss(tape, logits)

    def _causal_lm_loss(self, tape: Tape, logits: Tensor) -> Tensor:
        """`ForCausalLMLoss` (loss/loss_utils.py): in fp32, with labels that are padded and shifted."""
        logits = cast(tape, logits, FP32)
        labels = tape.new(self.run.batch * (self.run.sequence + 1), TOKEN_BYTES, "constant_pad_nd")
        shifted = labels if self.run.batch == 1 else tape.new(self.run.tokens, TOKEN_BYTES, "clone")
        loss = cross_entropy(tape, logits, shifted)
        del labels
        return loss


def _at_layer(tape: Tape, layer: int, block: Layer, x: Tensor) -> Outputs:
    with tape.at_layer(layer):
        return block(x)
