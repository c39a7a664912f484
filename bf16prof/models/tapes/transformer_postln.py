"""The model of the published example (see `modules/transformer_postln.py`): `nn.MultiheadAttention`
with averaged weights."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.models.autograd.operators import (
    TOKEN_BYTES,
    activation,
    add,
    contiguous,
    embedding,
    linear,
    mul,
    product,
    reshaped,
    row_mean,
    select,
    softmax,
    split,
    strided,
    swapped,
)
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.tapes import OwnNetwork, run_layers
from bf16prof.models.tapes.layers import linear_layer, norm_layer


def forward(tape: Tape, net: OwnNetwork, layers: Sequence[int]) -> Tensor:
    """Logits of every position."""
    model, hidden = net.model, net.model.hidden_size
    positions = tape.new(net.run.sequence, TOKEN_BYTES, "arange")
    table = tape.parameter("embedding.weight", model.vocab_size * hidden)
    rows = tape.parameter("pos_embedding.weight", model.max_sequence_length * hidden)
    x = add(
        tape,
        tape.module("embedding", lambda: embedding(tape, table, net.run.tokens, hidden)),
        tape.module("pos_embedding", lambda: embedding(tape, rows, net.run.tokens, hidden, positions)),
    )
    return linear_layer(tape, "output_proj", run_layers(tape, net, layers, _block, x), hidden, model.vocab_size)


def _block(tape: Tape, net: OwnNetwork, x: Tensor) -> Tensor:
    hidden = net.model.hidden_size
    weights: list[Tensor] = []
    attended = tape.module("attention", lambda q, k, v: _attention(tape, net, (q, k, v), weights), x, x, x)
    x = norm_layer(tape, "norm1", add(tape, x, attended), hidden)
    mixed = tape.module("ff", lambda x: _mlp(tape, net, x), x)
    x = norm_layer(tape, "norm2", add(tape, x, mixed), hidden)
    return x  # noqa: RET504 - as in the module, the names live to the end


def _mlp(tape: Tape, net: OwnNetwork, x: Tensor) -> Tensor:
    hidden = net.model.hidden_size
    x = linear_layer(tape, "ff.0", x, hidden, net.intermediate)
    x = tape.module("ff.1", lambda x: activation(tape, "gelu", x), x)
    return linear_layer(tape, "ff.2", x, net.intermediate, hidden)


def _attention(tape: Tape, net: OwnNetwork, inputs: Sequence[Tensor], weights: list[Tensor]) -> Tensor:
    """`F.multi_head_attention_forward` with need_weights, batch first (torch/nn/functional.py)."""
    hidden, heads = net.model.hidden_size, net.model.num_heads
    scores = net.run.batch * heads * net.run.sequence**2
    q, k, v = _projected(tape, net, inputs)
    scaled = mul(tape, q)
    attn = product(tape, scaled, k, scores, inner=hidden // heads, transposed=True)
    del scaled, k
    attn = softmax(tape, attn)
    mixed = product(tape, attn, v, q.numel, inner=net.run.sequence)
    del v
    mixed = contiguous(tape, mixed)
    weight, bias = tape.parameter("attention.out_proj.weight", hidden * hidden), tape.parameter("attention.out_proj.bias", hidden)
    mixed = linear(tape, mixed, weight, bias, hidden, is_matrix=True)
    attn = row_mean(tape, attn, scores // heads)
    weights.append(attn)
    return swapped(tape, mixed) if net.run.batch > 1 else mixed


def _projected(tape: Tape, net: OwnNetwork, given: Sequence[Tensor]) -> list[Tensor]:
    """`_in_projection_packed`: one product for the three, or three when ZeRO-3's hooks made them
    different tensors."""
    hidden = net.model.hidden_size
    weight, bias = tape.parameter("attention.in_proj_weight", 3 * hidden * hidden), tape.parameter("attention.in_proj_bias", 3 * hidden)
    inputs = [strided(each.view()) if net.run.batch > 1 else each for each in given]
    if not tape.zero3:
        projected = contiguous(tape, reshaped(tape, linear(tape, inputs[0], weight, bias, hidden)))
        return [reshaped(tape, each) for each in select(tape, projected, 3)]
    weights = split(tape, weight, [hidden * hidden] * 3)
    biases = split(tape, bias, [hidden] * 3)
    return [reshaped(tape, linear(tape, x, w, b, hidden)) for x, w, b in zip(inputs, weights, biases, strict=True)]
