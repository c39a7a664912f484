"""GPT-NeoX (Pythia): rotary positions over a part of each head, attention and MLP side by side.

transformers 5.23.0: `models/gpt_neox/modeling_gpt_neox.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.attention import Heads
from bf16prof.models.autograd.operators import add, reshaped, split
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.tapes.huggingface.blocks import Attended, Tables, act, counted, eager, rotary, sdpa, turn_in_part
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.models.tapes.layers import dropout_layer, linear_layer, norm_layer


@dataclass(frozen=True, eq=False)
class GPTNeoX(CausalLM):
    """GPTNeoXForCausalLM."""

    root: ClassVar[str] = "gpt_neox"
    tokens: ClassVar[str] = "embed_in"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "gelu", "attention_dropout": 0.0, "hidden_dropout": 0.0, "use_parallel_residual": True,
    }  # fmt: skip

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """GPTNeoXModel."""
        embedded = self.embedded(tape, self.hidden)
        positions = counted(tape, self.run.sequence)
        mask = self.masks(tape, [None], embedded.width)[None]
        entering = [dropout_layer(tape, "gpt_neox.emb_dropout", embedded, self.share("hidden_dropout"))]
        tables = tape.module("gpt_neox.rotary_emb", lambda: rotary(tape, positions, self.turned, embedded.width))
        x = self.through(tape, layers, entering.pop(), lambda _: functools.partial(self.block, tape, tables=tables, mask=mask))
        return norm_layer(tape, "gpt_neox.final_layer_norm", x, self.hidden)

    def block(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """GPTNeoXLayer."""
        dropped = self.share("hidden_dropout")
        normed = norm_layer(tape, "input_layernorm", x, self.hidden)
        attended, _ = tape.module("attention", lambda x: self.attention(tape, x, tables, mask), normed)
        del normed
        attended = dropout_layer(tape, "post_attention_dropout", attended, dropped)
        is_parallel = self.config.flag("use_parallel_residual")
        if not is_parallel:
            attended = add(tape, attended, x)
        normed = norm_layer(tape, "post_attention_layernorm", x if is_parallel else attended, self.hidden)
        mixed = tape.module("mlp", lambda x: self.mlp(tape, x), normed)
        del normed
        mixed = dropout_layer(tape, "post_mlp_dropout", mixed, dropped)
        return add(tape, add(tape, mixed, attended), x) if is_parallel else add(tape, mixed, attended)

    def attention(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Attended:
        """GPTNeoXAttention."""
        hidden, run, count, bias = self.hidden, self.run, self.config.count("num_attention_heads"), self.config.flag("attention_bias")
        width = self.config.head_width()
        heads = Heads(run.batch, count, count, run.sequence, width, run.capability, self.share("attention_dropout"), is_by_head=True)
        qkv = reshaped(tape, linear_layer(tape, "attention.query_key_value", x, hidden, 3 * hidden, bias=bias))
        q, k, v = split(tape, qkv, [run.tokens * hidden] * 3)
        q, k = turn_in_part(tape, q, k, tables, Fraction(self.turned, width))
        weights = None
        if self.is_eager:
            attended, weights = eager(tape, q, k, v, heads, mask=mask)
        else:
            attended = sdpa(tape, q, k, v, heads, mask=mask)
        return linear_layer(tape, "attention.dense", attended, hidden, hidden, bias=bias), weights

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """GPTNeoXMLP."""
        wide = self.config.count("intermediate_size")
        x = linear_layer(tape, "mlp.dense_h_to_4h", x, self.hidden, wide)
        x = act(tape, self.config.values["hidden_act"], "mlp.act", x)
        return linear_layer(tape, "mlp.dense_4h_to_h", x, wide, self.hidden)


FAMILIES = {"gpt_neox": GPTNeoX}
