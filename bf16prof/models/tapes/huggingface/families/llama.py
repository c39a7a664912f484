"""Llama and those built like it: rotary positions, RMSNorm before attention and a gated MLP.

transformers 5.23.0: `models/{llama,mistral,qwen2,qwen3}/modeling_*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bf16prof.models.autograd.attention import Heads
from bf16prof.models.autograd.operators import add, mul, reshaped
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.shapes.huggingface import blocks as shapes
from bf16prof.models.tapes.huggingface.blocks import Tables, act, attend, causal_mask, rms_norm, rotary, turn
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.models.tapes.layers import linear_layer


@dataclass(frozen=True, eq=False)
class Llama(CausalLM):
    """LlamaForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_dropout": 0.0}

    @property
    def heads(self) -> shapes.Heads:
        """The sizes of attention."""
        return shapes.Heads.of(self.config)

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """LlamaModel."""
        x = self.embedded(tape)
        positions = self.positions(tape)
        masks = self.masks(tape)
        tables = tape.module(f"{self.root}.rotary_emb", lambda: rotary(tape, positions, self.heads.width, x.width))
        x = self.through(tape, layers, x, lambda layer, x: self.block(tape, layer, x, tables, masks[self.window(layer)]))
        return self.norm(tape, f"{self.root}.norm", x, self.hidden)

    def masks(self, tape: Tape) -> dict[int | None, Tensor | None]:
        """The masks by the window that they leave open."""
        return {window: causal_mask(tape, self.run, window) for window in dict.fromkeys(self.windows)}

    @property
    def windows(self) -> Sequence[int | None]:
        """The window of each layer's attention."""
        return [None for _ in self.config.layers()]

    def window(self, layer: int) -> int | None:
        """Of one layer."""
        return self.windows[layer]

    def block(self, tape: Tape, layer: int, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """LlamaDecoderLayer."""
        residual = x
        x = self.norm(tape, "input_layernorm", x, self.hidden)
        x = tape.module("self_attn", lambda: self.attention(tape, x, tables, mask))
        x = add(tape, residual, x)
        residual = x
        x = self.norm(tape, "post_attention_layernorm", x, self.hidden)
        x = tape.module("mlp", lambda x: self.mlp(tape, x), x)
        return add(tape, residual, x)

    def norm(self, tape: Tape, name: str, x: Tensor, width: int) -> Tensor:
        """The norm of this family."""
        return rms_norm(tape, name, x, width)

    def attention(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """LlamaAttention."""
        sizes, run = self.heads, self.run
        q, k, v = (
            reshaped(tape, linear_layer(tape, f"self_attn.{name}_proj", x, sizes.hidden, rows, bias=self.bias))
            for name, rows in zip("qkv", sizes.inputs, strict=True)
        )
        q, k = turn(tape, q, k, tables)
        heads = Heads(run.batch, sizes.heads, sizes.kv_heads, run.sequence, sizes.width, run.capability, self.dropout)
        attended = attend(tape, q, k, v, heads, mask=mask)
        return linear_layer(tape, "self_attn.o_proj", attended, sizes.inputs[0], sizes.hidden, bias=self.output_bias)

    @property
    def dropout(self) -> float:
        """Share of the attention weights that is dropped."""
        return float(self.config.values["attention_dropout"])

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
        hidden, wide, bias = self.hidden, self.config.count("intermediate_size"), bool(self.config.values.get("mlp_bias"))

        def layer(name: str, x: Tensor, inputs: int, outputs: int) -> Tensor:
            return linear_layer(tape, f"mlp.{name}_proj", x, inputs, outputs, bias=bias)

        kind = self.config.values["hidden_act"]
        return layer(
            "down", mul(tape, act(tape, kind, "mlp.act_fn", layer("gate", x, hidden, wide)), layer("up", x, hidden, wide)), wide, hidden
        )


FAMILIES = {"llama": Llama}
