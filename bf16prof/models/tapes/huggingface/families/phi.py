"""Phi (1 to 2): attention and MLP side by side behind one layer norm, biases everywhere.

transformers 5.23.0: `models/phi/modeling_phi.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.operators import add, concatenate
from bf16prof.models.autograd.tape import STRIDED, Tape, Tensor
from bf16prof.models.tapes import NoTape
from bf16prof.models.tapes.huggingface.blocks import Attended, Tables, act, counted, cut, turn
from bf16prof.models.tapes.huggingface.families.llama import Llama
from bf16prof.models.tapes.layers import dropout_layer, linear_layer, norm_layer


@dataclass(frozen=True, eq=False)
class Phi(Llama):
    """PhiForCausalLM."""

    defaults: ClassVar[Mapping[str, Any]] = {**Llama.defaults, "hidden_act": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    has_head_bias: ClassVar[bool] = True
    is_by_head: ClassVar[bool] = True

    @property
    def bias(self) -> bool:
        """Always there."""
        return True

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """PhiModel."""
        if self.config.flag("qk_layernorm"):
            raise NoTape("model.hf_config.qk_layernorm is not modelled")
        embedded = self.embedded(tape, self.hidden)
        positions = counted(tape, self.run.sequence)
        mask = self.masks(tape, [None], embedded.width)[None]
        embedded = dropout_layer(tape, "model.embed_dropout", embedded, self.share("embd_pdrop"))
        tables = self.turning(tape, positions, embedded.width)
        x = self.through(tape, layers, embedded, lambda _: functools.partial(self.block, tape, tables=tables, mask=mask))
        return norm_layer(tape, "model.final_layernorm", x, self.hidden)

    def block(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """PhiDecoderLayer."""
        dropped = self.share("resid_pdrop")
        residual = x
        x = norm_layer(tape, "input_layernorm", x, self.hidden)
        attended, _ = tape.module("self_attn", lambda: self.attention(tape, x, tables, mask))
        attended = dropout_layer(tape, "resid_dropout", attended, dropped)
        mixed = dropout_layer(tape, "resid_dropout", tape.module("mlp", lambda x: self.mlp(tape, x), x), dropped)
        return add(tape, add(tape, attended, mixed), residual)

    def attention(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor | None) -> Attended:
        """PhiAttention."""
        q, k, v = self.by_heads(tape, x)
        share = Fraction(self.turned, self.heads.width)
        q_turned, q_passed = cut(tape, q, share)
        k_turned, k_passed = cut(tape, k, share)
        q_turned, k_turned = turn(tape, q_turned, k_turned, tables)
        q = concatenate(tape, q_turned, q_passed, layout=STRIDED)
        k = concatenate(tape, k_turned, k_passed, layout=STRIDED)
        attended, weights = self.attended(tape, q, k, v, mask)
        return linear_layer(tape, "self_attn.dense", attended, self.heads.inputs[0], self.hidden), weights

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """PhiMLP."""
        wide = self.config.count("intermediate_size")
        x = linear_layer(tape, "mlp.fc1", x, self.hidden, wide)
        x = act(tape, self.config.values["hidden_act"], "mlp.activation_fn", x)
        return linear_layer(tape, "mlp.fc2", x, wide, self.hidden)


FAMILIES = {"phi": Phi}
