"""Llama (see `modules/llama.py`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from bf16prof.models.autograd.attention import Heads, attention
from bf16prof.models.autograd.operators import (
    FP32,
    activation,
    add,
    cast,
    concatenate,
    contiguous,
    embedding,
    linear,
    mul,
    negative,
    reshaped,
    rms_norm,
    split,
)
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.tapes import OwnNetwork, run_layers
from bf16prof.models.tapes.layers import linear_layer


def forward(tape: Tape, net: OwnNetwork, layers: Sequence[int]) -> Tensor:
    """Logits of every position."""
    model, hidden = net.model, net.model.hidden_size
    table = tape.parameter("embed_tokens.weight", model.vocab_size * hidden)
    head = table if model.tie_embeddings else tape.parameter("lm_head.weight", model.vocab_size * hidden)
    x = tape.module("embed_tokens", lambda: embedding(tape, table, net.run.tokens, hidden))
    cos, sin = _rotary(tape, net, x.itemsize)
    out = _norm(tape, "norm", run_layers(tape, net, layers, _block, x, cos, sin), hidden)
    return tape.module("lm_head", lambda x: linear(tape, x, head, None, hidden), out)


def _rotary(tape: Tape, net: OwnNetwork, itemsize: int) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines, computed in fp32."""
    size = net.model.hidden_size // net.model.num_heads
    frequencies = tape.new(size // 2, FP32, "pow")
    outer = tape.new(net.run.sequence * size // 2, FP32, "mul")
    angles = tape.new(net.run.sequence * size, FP32, "repeat")
    del outer
    cos = cast(tape, tape.new(angles.numel, FP32, "cos"), itemsize)
    sin = cast(tape, tape.new(angles.numel, FP32, "sin"), itemsize)
    del frequencies
    return cos, sin


def _norm(tape: Tape, name: str, x: Tensor, hidden: int) -> Tensor:
    weight = tape.parameter(f"{name}.weight", hidden)
    return tape.module(name, lambda x: rms_norm(tape, x, weight), x)


def _block(tape: Tape, net: OwnNetwork, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    hidden = net.model.hidden_size
    attend = functools.partial(_attention, tape, net)
    x = add(tape, x, tape.module("self_attn", attend, _norm(tape, "input_layernorm", x, hidden), cos, sin))
    return add(tape, x, tape.module("mlp", lambda x: _mlp(tape, net, x), _norm(tape, "post_attention_layernorm", x, hidden)))


def _attention(tape: Tape, net: OwnNetwork, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    hidden, heads = net.model.hidden_size, net.model.num_heads
    groups, head_dim = net.model.num_kv_heads or heads, hidden // heads
    q, k, v = (
        reshaped(tape, linear_layer(tape, f"self_attn.{name}_proj", x, hidden, head_dim * n, bias=False))
        for name, n in (("q", heads), ("k", groups), ("v", groups))
    )
    shape = Heads(net.run.batch, heads, groups, net.run.sequence, head_dim, net.run.capability)
    attended = attention(tape, _rotate(tape, q, cos, sin), _rotate(tape, k, cos, sin), v, shape)
    return linear_layer(tape, "self_attn.o_proj", contiguous(tape, attended), hidden, hidden, bias=False)


def _rotate(tape: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = split(tape, x, [x.numel // 2] * 2)
    return add(tape, mul(tape, x, cos), mul(tape, concatenate(tape, negative(tape, second), first), sin))


def _mlp(tape: Tape, net: OwnNetwork, x: Tensor) -> Tensor:
    hidden, wide = net.model.hidden_size, net.intermediate
    return linear_layer(
        tape,
        "mlp.down_proj",
        mul(tape, _gate(tape, x, hidden, wide), linear_layer(tape, "mlp.up_proj", x, hidden, wide, bias=False)),
        wide,
        hidden,
        bias=False,
    )


def _gate(tape: Tape, x: Tensor, hidden: int, wide: int) -> Tensor:
    return activation(tape, "silu", linear_layer(tape, "mlp.gate_proj", x, hidden, wide, bias=False))
