"""Falcon: one key and value head, groups of them or as many as heads; a mask is always made, so that no kernel takes fewer key heads.

transformers 5.23.0: `models/falcon/modeling_falcon.py`. `FalconLinear` multiplies with a view of its weight, which is no linear layer to
DeepSpeed and which autocast casts anew each time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.attention import Heads, attention, repeated
from bf16prof.models.autograd.operators import add, contiguous, matmul, select, strided
from bf16prof.models.autograd.pointwise import added_in_place, dropout, indexed, sliced
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.shapes.huggingface.families.falcon import norms_twice
from bf16prof.models.tapes import NoTape
from bf16prof.models.tapes.huggingface.blocks import Attended, Tables, act, boolean_mask, counted, rotary, turn
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.models.tapes.layers import norm_layer


@dataclass(frozen=True, eq=False)
class Falcon(CausalLM):
    """FalconForCausalLM."""

    root: ClassVar[str] = "transformer"
    tokens: ClassVar[str] = "word_embeddings"
    defaults: ClassVar[Mapping[str, Any]] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation": "gelu", "alibi": False}

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """FalconModel."""
        if self.is_eager or self.config.flag("alibi"):
            raise NoTape("Falcon's activations are modelled for rotary positions and sdpa only")
        embedded = self.embedded(tape, self.hidden)
        positions = counted(tape, self.run.sequence)
        mask = boolean_mask(tape, self.run, None)
        tables = tape.module("transformer.rotary_emb", lambda: rotary(tape, positions, self.turned, embedded.width))
        x = self.through(tape, layers, embedded, lambda _: functools.partial(self.block, tape, tables=tables, mask=mask))
        return norm_layer(tape, "transformer.ln_f", x, self.hidden)

    def block(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor) -> Attended:
        """FalconDecoderLayer."""
        is_new, is_parallel = self.config.flag("new_decoder_architecture"), self.config.flag("parallel_attn")
        two = norms_twice(self.config)
        if is_new > is_parallel or two > is_new:
            raise NoTape("transformers itself cannot run this combination of new_decoder_architecture, parallel_attn and layer norms")
        residual = x
        before = norm_layer(tape, "ln_attn" if two else "input_layernorm", x, self.hidden)
        normed = norm_layer(tape, "ln_mlp", x, self.hidden) if two else before
        attended, _ = tape.module("self_attention", lambda x: self.attention(tape, x, tables, mask), before)
        if not is_parallel:
            residual = self._dropout_add(tape, attended, residual, "attention_dropout")
            normed = norm_layer(tape, "post_attention_layernorm", residual, self.hidden)
        mixed = tape.module("mlp", lambda x: self.mlp(tape, x), normed)
        if is_parallel:
            mixed = added_in_place(tape, mixed, attended)
        return self._dropout_add(tape, mixed, residual, "hidden_dropout"), None

    def attention(self, tape: Tape, x: Tensor, tables: Tables, mask: Tensor) -> Attended:
        """FalconAttention."""
        run, hidden, count = self.run, self.hidden, self.config.count("num_attention_heads")
        q, k, v, _ = self._by_heads(tape, x)
        q, k = turn(tape, q, k, tables)
        heads = Heads(
            run.batch, count, k.numel * count // q.numel, run.sequence, self.config.head_width(), run.capability, enable_gqa=False
        )
        attended = contiguous(tape, attention(tape, q, k, v, heads, mask=mask))
        return self._linear(tape, "self_attention.dense", attended, hidden, hidden), None

    def mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """FalconMLP."""
        hidden, wide = self.hidden, self.config.count_or("ffn_hidden_size", 4 * self.hidden)
        x = act(tape, self.config.values["activation"], "mlp.act", self._linear(tape, "mlp.dense_h_to_4h", x, hidden, wide))
        return self._linear(tape, "mlp.dense_4h_to_h", x, wide, hidden)

    def _by_heads(self, tape: Tape, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`_split_heads`, and what is split."""
        tokens, hidden, width, count = self.run.tokens, self.hidden, self.config.head_width(), self.config.count("num_attention_heads")
        groups = self.config.count_or("num_kv_heads", count)
        if self.config.flag("new_decoder_architecture"):
            if groups == 1:
                raise NoTape("the new decoder architecture with one key and value head is not modelled")
            fused = self._linear(tape, "self_attention.query_key_value", x, hidden, (2 * groups + count) * width)
            q = sliced(tape, fused, tokens * hidden)
            k, v = indexed(tape, fused, tokens * groups * width), indexed(tape, fused, tokens * groups * width)
            q = strided(contiguous(tape, q))
            k, v = (strided(repeated(tape, each, tokens * hidden, is_copied=True)) for each in (k, v))
            return q, k, v, fused
        if self.config.flag("multi_query"):
            fused = self._linear(tape, "self_attention.query_key_value", x, hidden, hidden + 2 * width)
            q = sliced(tape, fused, tokens * hidden)
            k, v = indexed(tape, fused, tokens * width), indexed(tape, fused, tokens * width)
            return strided(q), strided(k), strided(v), fused
        if groups != count:
            raise NoTape(f"transformers itself cannot run {groups} num_kv_heads beside {count} heads without new_decoder_architecture")
        fused = self._linear(tape, "self_attention.query_key_value", x, hidden, 3 * hidden)
        q, k, v = (strided(each) for each in select(tape, fused, 3))
        return q, k, v, fused

    def _linear(self, tape: Tape, name: str, x: Tensor, inputs: int, outputs: int) -> Tensor:
        """FalconLinear."""
        weight = tape.parameter(f"{name}.weight", inputs * outputs)
        bias = tape.parameter(f"{name}.bias", outputs) if self.config.flag("bias") else None

        def forward(x: Tensor) -> Tensor:
            out = matmul(tape, x, tape.view_of(weight), inputs)
            return out if bias is None else add(tape, out, bias)

        return tape.module(name, forward, x)

    def _dropout_add(self, tape: Tape, x: Tensor, residual: Tensor, share: str) -> Tensor:
        out = dropout(tape, x, self.share(share))
        return add(tape, residual, out)


FAMILIES = {"falcon": Falcon}
