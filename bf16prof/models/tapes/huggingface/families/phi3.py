"""Phi-3 and Phi-4: Llama's layer with one projection for query, key and value, and one for gate and up.

transformers 5.23.0: `models/phi3/modeling_phi3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.operators import add, concatenate, mul, split
from bf16prof.models.autograd.pointwise import sliced
from bf16prof.models.autograd.tape import STRIDED, Tape, Tensor
from bf16prof.models.tapes.huggingface.blocks import Attended, Tables, act, cut, turned
from bf16prof.models.tapes.huggingface.families.llama import Mistral
from bf16prof.models.tapes.layers import dropout_layer, linear_layer


@dataclass(frozen=True, eq=False)
class Phi3(Mistral):
    """Phi3ForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {**Mistral.defaults, "sliding_window": None, "resid_pdrop": 0.0}
    is_by_head: ClassVar[bool] = True

    def block(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """Phi3DecoderLayer."""
        dropped = self.share("resid_pdrop")
        residual = x
        x = self.norm(tape, "input_layernorm", x, self.hidden)
        x, _ = tape.module("self_attn", lambda: self.attention(tape, x, tables, mask))
        x = add(tape, residual, dropout_layer(tape, "resid_attn_dropout", x, dropped))
        residual = x
        x = self.norm(tape, "post_attention_layernorm", x, self.hidden)
        x = tape.module("mlp", lambda x: self.mlp(tape, x), x)
        return add(tape, residual, dropout_layer(tape, "resid_mlp_dropout", x, dropped))

    def attention(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Attended:
        """Phi3Attention."""
        rows = self.heads.inputs
        qkv = linear_layer(tape, "self_attn.qkv_proj", x, self.hidden, sum(rows), bias=False)
        q, k, v = (sliced(tape, qkv, self.run.tokens * each) for each in rows)
        q, k, v = (self.parted(tape, each, width) for each, width in zip((q, k, v), rows, strict=True))
        q, k = self._turned(tape, q, k, tables)
        attended, weights = self.attended(tape, q, k, v, mask)
        return self.output(tape, attended), weights

    def _turned(self, tape: Tape, q: Tensor, k: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        share = Fraction(self.turned, self.heads.width)
        q_first, q_passed = cut(tape, q, share)
        k_first, k_passed = cut(tape, k, share)
        q_embed = concatenate(tape, turned(tape, q_first, tables), q_passed, layout=STRIDED)
        return q_embed, concatenate(tape, turned(tape, k_first, tables), k_passed, layout=STRIDED)

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """Phi3MLP."""
        hidden, wide = self.hidden, self.config.count("intermediate_size")
        up = linear_layer(tape, "mlp.gate_up_proj", x, hidden, 2 * wide, bias=False)
        gate, up = split(tape, up, [up.numel // 2] * 2)
        up = mul(tape, up, act(tape, self.config.values[self.activation], "mlp.activation_fn", gate))
        return linear_layer(tape, "mlp.down_proj", up, wide, hidden, bias=False)


FAMILIES = {"phi3": Phi3}
