"""Llama and those built like it: rotary positions, RMSNorm before attention and a gated MLP.

transformers 5.23.0: `models/{llama,mistral,qwen2,qwen3}/modeling_*.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.attention import Heads
from bf16prof.models.autograd.operators import add, mul, reshaped, strided, viewed
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.shapes.huggingface import blocks as shapes
from bf16prof.models.tapes.huggingface.blocks import (
    Attended,
    Tables,
    act,
    counted,
    eager,
    rms_norm,
    rotary,
    sdpa,
    turn,
    windows_of,
)
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.models.tapes.layers import linear_layer


@dataclass(frozen=True, eq=False)
class Llama(CausalLM):
    """LlamaForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_dropout": 0.0}
    activation: ClassVar[str] = "hidden_act"
    is_by_head: ClassVar[bool] = False

    @property
    def heads(self) -> shapes.HeadSizes:
        """The sizes of attention."""
        return shapes.HeadSizes.of(self.config)

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """LlamaModel."""
        embedded = self.embedded(tape, self.hidden)
        positions = counted(tape, self.run.sequence)
        windows = self.windows
        masks = self.masks(tape, windows, embedded.width)
        tables = self.tables(tape, positions, embedded.width)
        x = self.through(
            tape,
            layers,
            embedded,
            lambda layer: functools.partial(self.block, tape, tables=tables[windows[layer]], mask=masks[windows[layer]]),
        )
        return self.norm(tape, f"{self.root}.norm", x, self.hidden)

    def tables(self, tape: Tape, positions: Tensor, width: int) -> Mapping[int | None, Tables]:
        """Of the rotary angles, by window; the same for all layers."""
        return dict.fromkeys(self.windows, self.turning(tape, positions, width))

    def turning(self, tape: Tape, positions: Tensor, width: int) -> Tables:
        """`rotary_emb`."""
        return tape.module(f"{self.root}.rotary_emb", lambda: rotary(tape, positions, self.turned, width))

    @property
    def windows(self) -> Sequence[int | None]:
        """How many positions each layer's attention looks back on (`None`: all)."""
        return [None for _ in self.config.layers()]

    @property
    def kinds(self) -> Sequence[Hashable]:
        """Layers of different windows have masks, and may have tables, of their own."""
        return self.windows

    def block(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """LlamaDecoderLayer."""
        residual = x
        x = self.norm(tape, "input_layernorm", x, self.hidden)
        x, _ = tape.module("self_attn", lambda: self.attention(tape, x, tables, mask))
        x = add(tape, residual, x)
        residual = x
        x = self.norm(tape, "post_attention_layernorm", x, self.hidden)
        x = tape.module("mlp", lambda x: self.mlp(tape, x), x, is_leaf=self.has_leaf(tape.layer))
        return add(tape, residual, x)

    def has_leaf(self, layer: int) -> bool:
        """Whether DeepSpeed takes a layer's MLP as one module (mixtures of experts)."""
        return False

    def norm(self, tape: Tape, name: str, x: Tensor, width: int) -> Tensor:
        """The norm of this family."""
        return rms_norm(tape, name, x, width)

    def attention(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Attended:
        """LlamaAttention."""
        q, k, v = self.by_heads(tape, x)
        q, k = turn(tape, q, k, tables)
        attended, weights = self.attended(tape, q, k, v, mask)
        return self.output(tape, attended), weights

    def attended(self, tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Attended:
        """The configured implementation of attention."""
        sizes, run = self.heads, self.run
        dropped = self.share("attention_dropout")
        heads = Heads(
            run.batch, sizes.heads, sizes.kv_heads, run.sequence, sizes.width, run.capability, dropped, is_by_head=self.is_by_head
        )
        if self.is_eager:
            return eager(tape, q, k, v, heads, mask=mask, caps=self.caps)
        return sdpa(tape, q, k, v, heads, mask=mask), None

    @property
    def caps(self) -> bool:
        """Whether the scores are capped."""
        return False

    def output(self, tape: Tape, attended: Tensor) -> Tensor:
        """The output projection."""
        return linear_layer(tape, "self_attn.o_proj", attended, self.heads.inputs[0], self.hidden, bias=self.output_bias)

    def by_heads(self, tape: Tape, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        q, k, v = (
            self.parted(tape, self.projected(tape, name, x, rows), rows) for name, rows in zip("qkv", self.heads.inputs, strict=True)
        )
        return q, k, v

    def parted(self, tape: Tape, x: Tensor, rows: int) -> Tensor:
        """x by heads; one head needs no other order."""
        return x.view() if rows == self.heads.width else reshaped(tape, x)

    def projected(self, tape: Tape, name: str, x: Tensor, rows: int) -> Tensor:
        """One of the three projections."""
        return linear_layer(tape, f"self_attn.{name}_proj", x, self.hidden, rows, bias=self.bias)

    @property
    def bias(self) -> bool:
        """Of query, key and value."""
        return self.config.flag("attention_bias")

    @property
    def output_bias(self) -> bool:
        """Of the output projection."""
        return self.bias

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """LlamaMLP."""
        return self.gated(tape, "mlp", x, self.config.count("intermediate_size"))

    def gated(self, tape: Tape, name: str, x: Tensor, wide: int) -> Tensor:
        """A gated MLP of that width."""
        hidden, bias = self.hidden, bool(self.config.values.get("mlp_bias"))

        def layer(part: str, x: Tensor, inputs: int, outputs: int) -> Tensor:
            return linear_layer(tape, f"{name}.{part}_proj", x, inputs, outputs, bias=bias)

        gate = act(tape, self.config.values[self.activation], f"{name}.act_fn", layer("gate", x, hidden, wide))
        return layer("down", mul(tape, gate, layer("up", x, hidden, wide)), wide, hidden)


@dataclass(frozen=True, eq=False)
class Mistral(Llama):
    """MistralForCausalLM: all layers look back as far."""

    defaults: ClassVar[Mapping[str, Any]] = {**Llama.defaults, "sliding_window": 4096}

    @property
    def windows(self) -> Sequence[int | None]:
        """The same for all layers."""
        return [self.config.count_or_none("sliding_window") for _ in self.config.layers()]

    @property
    def bias(self) -> bool:
        """There is none."""
        return False


SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


@dataclass(frozen=True, eq=False)
class Qwen2(Llama):
    """Qwen2ForCausalLM: biases before attention, windows in the layers above some."""

    defaults: ClassVar[Mapping[str, Any]] = {**Llama.defaults, **SLIDING}

    @property
    def windows(self) -> Sequence[int | None]:
        """By the types of layers; from `max_window_layers` on, if not said."""
        first = self.config.values["max_window_layers"] if self.window else math.inf
        return windows_of(self.config, self.window, lambda layer: layer >= first)

    @property
    def window(self) -> int | None:
        """How far layers that do not see everything look back; `None` where all do."""
        return self.config.count_or_none("sliding_window") if self.config.flag("use_sliding_window") else None

    @property
    def bias(self) -> bool:
        """Always there."""
        return True

    @property
    def output_bias(self) -> bool:
        """Never there."""
        return False


@dataclass(frozen=True, eq=False)
class Qwen3(Qwen2):
    """Qwen3ForCausalLM: queries and keys are normed."""

    def by_heads(self, tape: Tape, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys are normed at once."""
        q, k = (self._normed(tape, name, x, rows) for name, rows in zip("qk", self.heads.inputs, strict=False))
        rows = self.heads.inputs[2]
        return q, k, self.parted(tape, self.projected(tape, "v", x, rows), rows)

    def _normed(self, tape: Tape, name: str, x: Tensor, rows: int) -> Tensor:
        width = self.heads.width
        out = self.projected(tape, name, x, rows)
        if rows == width:
            return self.norm(tape, f"self_attn.{name}_norm", out, width)
        return strided(self.norm(tape, f"self_attn.{name}_norm", viewed(tape, out), width))

    bias = Llama.bias
    output_bias = Llama.output_bias


FAMILIES = {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3}
