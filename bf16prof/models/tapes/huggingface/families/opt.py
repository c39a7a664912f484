"""OPT: learned positions that are counted by a sum of ones, an embedding that may be narrower than the model, norms before or after.

transformers 5.23.0: `models/opt/modeling_opt.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.attention import Heads
from bf16prof.models.autograd.operators import FP32, TOKEN_BYTES, add, embedding, in_rows, mul, reshaped
from bf16prof.models.autograd.pointwise import dropout
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.shapes.huggingface.families.opt import POSITION_OFFSET
from bf16prof.models.tapes.huggingface.blocks import Attended, act, eager, sdpa
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.models.tapes.layers import linear_layer, norm_layer


@dataclass(frozen=True, eq=False)
class OPT(CausalLM):
    """OPTForCausalLM."""

    tokens: ClassVar[str] = "decoder.embed_tokens"
    defaults: ClassVar[Mapping[str, Any]] = {"activation_function": "relu", "dropout": 0.1, "attention_dropout": 0.0}

    @property
    def narrow(self) -> int:
        """Width of the embeddings."""
        return self.config.count_or("word_embed_proj_dim", self.hidden)

    @property
    def _is_pre_norm(self) -> bool:
        return self.config.flag("do_layer_norm_before")

    def logits(self, tape: Tape, x: Tensor) -> Tensor:
        """The output head, as narrow as the embedding."""
        return self.head(tape, x, self.narrow)

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """OPTModel."""
        return tape.module("model.decoder", lambda: self.decoder(tape, layers))

    def decoder(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """OPTDecoder."""
        hidden, narrow, tokens = self.hidden, self.narrow, self.run.tokens
        embedded = self.embedded(tape, narrow)
        ones = tape.new(tokens, FP32, "ones")
        summed = tape.new(tokens, FP32, "cumsum")
        positions = self._positions(tape, tokens)
        del summed
        mask = self.masks(tape, [None], embedded.width)[None]
        rows = tape.parameter(
            "model.decoder.embed_positions.weight", (self.config.count("max_position_embeddings") + POSITION_OFFSET) * hidden
        )

        def placed() -> Tensor:
            return embedding(tape, rows, tokens, hidden, tape.new(tokens, TOKEN_BYTES, "add"))

        place = tape.module("model.decoder.embed_positions", placed)
        if narrow != hidden:
            embedded = linear_layer(tape, "model.decoder.project_in", embedded, narrow, hidden, bias=False)
        x = self.through(tape, layers, add(tape, embedded, place), lambda _: functools.partial(self.block, tape, mask=mask))
        if self._is_pre_norm and not self.config.flag("_remove_final_layer_norm"):
            x = self._norm(tape, "model.decoder.final_layer_norm", x)
        if narrow != hidden:
            x = linear_layer(tape, "model.decoder.project_out", x, hidden, narrow, bias=False)
        del ones, positions
        return x

    def block(self, tape: Tape, x: Tensor, mask: Tensor | None) -> Tensor:
        """OPTDecoderLayer."""
        hidden, wide, bias, dropped = self.hidden, self.config.count("ffn_dim"), self.config.flag("enable_bias"), self.share("dropout")
        residual = x
        if self._is_pre_norm:
            x = self._norm(tape, "self_attn_layer_norm", x)
        x, _ = tape.module("self_attn", lambda: self.attention(tape, x, mask))
        x = dropout(tape, x, dropped)
        x = add(tape, residual, x)
        if not self._is_pre_norm:
            x = self._norm(tape, "self_attn_layer_norm", x)
        residual = x
        if self._is_pre_norm:
            x = self._norm(tape, "final_layer_norm", x)
        x = linear_layer(tape, "fc1", x, hidden, wide, bias=bias, is_matrix=True)
        x = act(tape, self.config.values["activation_function"], "activation_fn", x)
        x = linear_layer(tape, "fc2", x, wide, hidden, bias=bias, is_matrix=True)
        x = dropout(tape, x, dropped)
        x = add(tape, residual, x)
        return x if self._is_pre_norm else self._norm(tape, "final_layer_norm", x)

    def attention(self, tape: Tape, x: Tensor, mask: Tensor | None) -> Attended:
        """OPTAttention: queries are scaled before they are parted."""
        hidden, run, count = self.hidden, self.run, self.config.count("num_attention_heads")
        heads = Heads(run.batch, count, count, run.sequence, self.config.head_width(), run.capability, self.share("attention_dropout"))
        q = mul(tape, self._projected(tape, "q", x))
        q = reshaped(tape, q)
        k = self._projected(tape, "k", x)
        k = k if run.batch == 1 else in_rows(tape, k)
        v = self._projected(tape, "v", x)
        k, v = reshaped(tape, k), reshaped(tape, v)
        weights = None
        if self.is_eager:
            attended, weights = eager(tape, q, k, v, heads, mask=mask)
        else:
            attended = sdpa(tape, q, k, v, heads, mask=mask)
        return linear_layer(tape, "self_attn.out_proj", attended, hidden, hidden, bias=self.config.flag("enable_bias")), weights

    def _projected(self, tape: Tape, name: str, x: Tensor) -> Tensor:
        return linear_layer(tape, f"self_attn.{name}_proj", x, self.hidden, self.hidden, bias=self.config.flag("enable_bias"))

    def _norm(self, tape: Tape, name: str, x: Tensor) -> Tensor:
        return norm_layer(tape, name, x, self.hidden, affine=self.config.flag("layer_norm_elementwise_affine"))

    def _positions(self, tape: Tape, tokens: int) -> Tensor:
        """`(position_ids * position_attention_mask - 1).long()`."""
        product = tape.new(tokens, FP32, "mul")
        less = tape.new(tokens, FP32, "sub")
        del product
        positions = tape.new(tokens, TOKEN_BYTES, "_to_copy")
        del less
        return positions


FAMILIES = {"opt": OPT}
