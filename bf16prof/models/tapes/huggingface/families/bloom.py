"""BLOOM: ALiBi that is added to the scores by `baddbmm`, score matrices in full, a GELU with formulas of its own.

transformers 5.23.0: `models/bloom/modeling_bloom.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bf16prof.lazy_dataclass import dataclass
from bf16prof.models.autograd.attention import by_position, head_by_head
from bf16prof.models.autograd.operators import (
    FP32,
    TOKEN_BYTES,
    add,
    autocast,
    cast,
    contiguous,
    mul,
    product,
    select,
    softmax,
    strided,
)  # fmt: skip
from bf16prof.models.autograd.pointwise import dropout, plus_number, tanh
from bf16prof.models.autograd.tape import GraphNode, Tape, Tensor
from bf16prof.models.tapes import NoTape
from bf16prof.models.tapes.huggingface.blocks import Attended
from bf16prof.models.tapes.huggingface.causal import CausalLM
from bf16prof.models.tapes.layers import dropout_layer, linear_layer, norm_layer


@dataclass(frozen=True, eq=False)
class Bloom(CausalLM):
    """BloomForCausalLM."""

    root: ClassVar[str] = "transformer"
    tokens: ClassVar[str] = "word_embeddings"
    layers: ClassVar[str] = "n_layer"
    has_sdpa: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "apply_residual_connection_post_layernorm": False, "slow_but_exact": False,
    }  # fmt: skip

    def body(self, tape: Tape, layers: Sequence[int]) -> Tensor:
        """BloomModel."""
        if self.config.flag("slow_but_exact"):
            raise NoTape("model.hf_config.slow_but_exact is not modelled")
        embedded = self.embedded(tape, self.hidden)
        entering = [norm_layer(tape, "transformer.word_embeddings_layernorm", embedded, self.hidden)]
        alibi = self._alibi(tape, embedded.width)
        mask = self.masks(tape, [None], embedded.width)[None]
        x = self.through(tape, layers, entering.pop(), lambda _: functools.partial(self.block, tape, alibi=alibi, mask=mask))
        return norm_layer(tape, "transformer.ln_f", x, self.hidden)

    def block(self, tape: Tape, x: Tensor, alibi: Tensor, mask: Tensor | None) -> Attended:
        """BloomBlock."""
        is_post = self.config.flag("apply_residual_connection_post_layernorm")
        normed = norm_layer(tape, "input_layernorm", x, self.hidden)
        residual = normed if is_post else x
        attended, weights = tape.module(
            "self_attention", lambda x, residual: self.attention(tape, x, residual, alibi, mask), normed, residual
        )
        normed = norm_layer(tape, "post_attention_layernorm", attended, self.hidden)
        residual = normed if is_post else attended
        return tape.module("mlp", lambda x, residual: self.mlp(tape, x, residual), normed, residual), weights

    def attention(self, tape: Tape, x: Tensor, residual: Tensor, alibi: Tensor, mask: Tensor | None) -> Attended:
        """BloomAttention."""
        run, hidden, count = self.run, self.hidden, self.config.count("n_head")
        fused = linear_layer(tape, "self_attention.query_key_value", x, hidden, 3 * hidden)
        q, k, v = (strided(each) for each in select(tape, fused, 3))
        q, k, v = (head_by_head(tape, each, run.batch) for each in (q, k, v))
        scores = _added_product(tape, alibi, q, k, run.batch * count * run.sequence**2, inner=hidden // count)
        masked = scores if mask is None else add(tape, scores, mask)
        weights = cast(tape, softmax(tape, masked, width=FP32), q.width)
        weights = dropout_layer(tape, "self_attention.attention_dropout", weights, self.share("attention_dropout"))
        context = by_position(tape, product(tape, weights, v, run.tokens * hidden, inner=run.sequence), run.batch)
        context = contiguous(tape, context)
        out = linear_layer(tape, "self_attention.dense", context, hidden, hidden)
        out = _dropout_add(tape, out, residual, self.share("hidden_dropout"))
        del scores, masked
        return out, weights

    def mlp(self, tape: Tape, x: Tensor, residual: Tensor) -> Tensor:
        """BloomMLP."""
        wide = 4 * self.hidden
        x = tape.module("mlp.gelu_impl", lambda x: _gelu(tape, x), linear_layer(tape, "mlp.dense_h_to_4h", x, self.hidden, wide))
        mixed = linear_layer(tape, "mlp.dense_4h_to_h", x, wide, self.hidden)
        return _dropout_add(tape, mixed, residual, self.share("hidden_dropout"))

    def _alibi(self, tape: Tape, width: int) -> Tensor:
        """Slopes times positions, for each head of each sequence."""
        run, count = self.run, self.config.count("n_head")
        positions = tape.new(run.sequence, TOKEN_BYTES, "arange")
        one = tape.new(count * run.sequence, FP32, "mul")
        del positions
        return cast(tape, tape.new(run.batch * one.numel, FP32, "repeat"), width)


def _added_product(tape: Tape, added: Tensor, a: Tensor, b: Tensor, numel: int, *, inner: int) -> Tensor:
    """`baddbmm` over a common dimension of `inner`, with a factor for the product and a first argument without gradient."""
    added, a, b = autocast(tape, added), autocast(tape, a), autocast(tape, b)

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        tape.compute(2 * operations)
        of_a = _scaled(tape, a_numel, grads[0].width)
        of_b = _scaled(tape, b_numel, grads[0].width)
        del saved
        return (of_a, of_b)

    a_numel, b_numel, operations = a.numel, b.numel, 2 * numel * inner
    node = tape.node((a, b), run, a, b)
    tape.compute(operations)
    return tape.new(numel, a.width, "baddbmm", node)


def _scaled(tape: Tape, numel: int, width: int) -> Tensor:
    made = tape.new(numel, width, "bmm")
    return tape.new(made.numel, width, "mul")


def _dropout_add(tape: Tape, x: Tensor, residual: Tensor, share: float) -> Tensor:
    out = dropout(tape, x, share)
    return add(tape, residual, out)


def _gelu(tape: Tape, x: Tensor) -> Tensor:
    """`GeLUFunction`: what is computed in between is not kept; backward computes it again."""

    def run(node: GraphNode, grads: list[Any]) -> Sequence[Any]:
        saved = node.unpack()
        out = _times_derivative(tape, tape.detached(saved[0]), grads[0])
        del saved
        grads.clear()
        return (out,)

    node = tape.node((x,), run, x)
    plain = tape.detached(x)
    half = mul(tape, plain)
    out = mul(tape, half, plus_number(tape, _inner(tape, plain)))
    out.node = node
    return out


def _inner(tape: Tape, x: Tensor) -> Tensor:
    return tanh(tape, mul(tape, mul(tape, x), plus_number(tape, mul(tape, mul(tape, x), x))))


def _times_derivative(tape: Tape, x: Tensor, grad: Tensor) -> Tensor:
    """`bloom_gelu_back`."""
    inner = _inner(tape, x)
    half = mul(tape, x)
    first = mul(tape, half, mul(tape, _less(tape, mul(tape, inner, inner)), plus_number(tape, mul(tape, mul(tape, x), x))))
    del half
    factor = add(tape, first, mul(tape, plus_number(tape, inner)))
    del first
    return mul(tape, factor, grad)


def _less(tape: Tape, x: Tensor) -> Tensor:
    """1 - x."""
    return tape.new(x.numel, x.width, "rsub")


FAMILIES = {"bloom": Bloom}
