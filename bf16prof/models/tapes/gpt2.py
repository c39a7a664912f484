"""GPT-2 (see `modules/gpt2.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.models.autograd.attention import Heads, attention
from bf16prof.models.autograd.operators import TOKEN_BYTES, activation, add, contiguous, embedding, linear, split
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.tapes import OwnNetwork, run_layers
from bf16prof.models.tapes.layers import linear_layer, norm_layer


def forward(tape: Tape, net: OwnNetwork, layers: Sequence[int]) -> Tensor:
    """Logits of every position."""
    model, hidden = net.model, net.model.hidden_size
    positions = tape.new(net.run.sequence, TOKEN_BYTES, "arange")
    table = tape.parameter("wte.weight", model.vocab_size * hidden)
    rows = tape.parameter("wpe.weight", model.max_sequence_length * hidden)
    x = add(
        tape,
        tape.module("wte", lambda: embedding(tape, table, net.run.tokens, hidden)),
        tape.module("wpe", lambda: embedding(tape, rows, net.run.sequence, hidden, positions)),
    )
    tied = model.tie_embeddings is None or model.tie_embeddings
    head = table if tied else tape.parameter("lm_head.weight", model.vocab_size * hidden)
    return tape.module(
        "lm_head", lambda x: linear(tape, x, head, None, hidden), norm_layer(tape, "ln_f", run_layers(tape, net, layers, _block, x), hidden)
    )


def _block(tape: Tape, net: OwnNetwork, x: Tensor) -> Tensor:
    hidden = net.model.hidden_size
    x = add(tape, x, tape.module("attn", lambda x: _attention(tape, net, x), norm_layer(tape, "ln_1", x, hidden)))
    return add(tape, x, tape.module("mlp", lambda x: _mlp(tape, net, x), norm_layer(tape, "ln_2", x, hidden)))


def _attention(tape: Tape, net: OwnNetwork, x: Tensor) -> Tensor:
    hidden, heads = net.model.hidden_size, net.model.num_heads
    shape = Heads(net.run.batch, heads, heads, net.run.sequence, hidden // heads, net.run.capability)
    q, k, v = split(tape, linear_layer(tape, "attn.c_attn", x, hidden, 3 * hidden), [net.run.tokens * hidden] * 3)
    attended = attention(tape, q, k, v, shape)
    return linear_layer(tape, "attn.c_proj", contiguous(tape, attended), hidden, hidden)


def _mlp(tape: Tape, net: OwnNetwork, x: Tensor) -> Tensor:
    hidden = net.model.hidden_size
    wide = activation(tape, "gelu", linear_layer(tape, "mlp.c_fc", x, hidden, net.intermediate))
    return linear_layer(tape, "mlp.c_proj", wide, net.intermediate, hidden)
