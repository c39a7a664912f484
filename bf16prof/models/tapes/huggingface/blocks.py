"""What the families have in common: norms, rotary positions, attention with grouped heads, masks, gated MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from bf16prof.models.autograd.attention import Heads, attention, by_position, expanded, in_order, matrix_product, repeated
from bf16prof.models.autograd.operators import (
    FP32,
    TOKEN_BYTES,
    activation,
    add,
    cast,
    concatenate,
    contiguous,
    mul,
    negative,
    softmax,
    strided,
)
from bf16prof.models.autograd.pointwise import dropout, over_number, plus_number, power, reciprocal_root, relu, row_mean, sliced, tanh
from bf16prof.models.autograd.tape import STRIDED, Tape, Tensor
from bf16prof.models.shapes.huggingface.config import LAYER_TYPES, Config, shown
from bf16prof.models.tapes import ForwardRun, NoTape

LARGEST_GROUPED_HEAD = 256
"""`use_gqa_in_sdpa` (integrations/sdpa_attention.py): wider heads are repeated, and so are all where there is a mask."""


def rms_norm(tape: Tape, name: str, x: Tensor, width: int) -> Tensor:
    """`LlamaRMSNorm`: normed in fp32, scaled in the dtype of the input."""
    weight = tape.parameter(f"{name}.weight", width)

    def forward(x: Tensor) -> Tensor:
        given = x.width
        x = cast(tape, x, FP32)
        variance = row_mean(tape, power(tape, x), x.numel // width)
        x = mul(tape, x, reciprocal_root(tape, plus_number(tape, variance)))
        return mul(tape, weight, cast(tape, x, given))

    return tape.module(name, forward, x)


Tables = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles."""


Attended = tuple[Tensor, Tensor | None]
"""What attention gives, and the weights, if they are a tensor."""


def rotary(tape: Tape, positions: Tensor, turned: int, width: int) -> Tables:
    """`LlamaRotaryEmbedding.forward`: tables [sequence, turned] in the dtype of the hidden states, computed in fp32."""
    if turned % 2:
        raise NoTape(f"an odd number of dimensions ({turned}) cannot be turned in pairs")
    frequencies = _angles(tape, positions, turned)
    angles = concatenate(tape, frequencies, frequencies)
    cos = mul(tape, tape.new(angles.numel, FP32, "cos"))
    sin = mul(tape, tape.new(angles.numel, FP32, "sin"))
    return cast(tape, cos, width), cast(tape, sin, width)


def _angles(tape: Tape, positions: Tensor, turned: int) -> Tensor:
    floats = cast(tape, positions, FP32)
    angles = tape.new(positions.numel * turned // 2, FP32, "mul")
    del floats
    return angles


def turn(tape: Tape, q: Tensor, k: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`."""
    q_embed = turned(tape, q, tables)
    k_embed = turned(tape, k, tables)
    return q_embed, k_embed


def turned(tape: Tape, x: Tensor, tables: Tables) -> Tensor:
    """Each pair of dimensions turned by its angle."""
    cos, sin = tables
    return add(tape, mul(tape, x, cos), mul(tape, _half_turned(tape, x), sin))


def _half_turned(tape: Tape, x: Tensor) -> Tensor:
    first, second = sliced(tape, x, x.numel // 2), sliced(tape, x, x.numel // 2)
    return concatenate(tape, negative(tape, second), first)


def turn_in_part(tape: Tape, q: Tensor, k: Tensor, tables: Tables, share: Fraction) -> tuple[Tensor, Tensor]:
    """The same for the first dimensions of each head alone, which are put together with the others."""
    q_turned, q_passed = cut(tape, q, share)
    k_turned, k_passed = cut(tape, k, share)
    q_embed, k_embed = turn(tape, q_turned, k_turned, tables)
    q_embed = concatenate(tape, q_embed, q_passed, layout=STRIDED)
    k_embed = concatenate(tape, k_embed, k_passed, layout=STRIDED)
    return q_embed, k_embed


def cut(tape: Tape, x: Tensor, share: Fraction) -> tuple[Tensor, Tensor]:
    """The dimensions of each head that are turned, and the others."""
    first = int(x.numel * share)
    return x if first == x.numel else sliced(tape, x, first), sliced(tape, x, x.numel - first)


def windows_of(config: Config, window: int | None, slides: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer's attention, by `layer_types`; by number where the configuration has none."""
    types = config.items("layer_types") or [LAYER_TYPES[not slides(index)] for index in config.layers()]
    if len(types) < len(config.layers()) or not set(types) <= set(LAYER_TYPES):
        raise NoTape(f"model.hf_config.layer_types: {shown(types)} is not modelled")
    return [window if name == "sliding_attention" else None for name, _ in zip(types, config.layers(), strict=False)]


def needs_mask(run: ForwardRun, window: int | None) -> bool:
    """`_ignore_causal_mask_sdpa` (masking_utils.py): attention that is plainly causal needs none."""
    return window is not None and run.sequence >= window


def boolean_mask(tape: Tape, run: ForwardRun, window: int | None) -> Tensor:
    """`sdpa_mask`: which positions see which, [sequence, sequence], with a window if there is one."""
    length = run.sequence
    batches, heads = tape.new(run.batch, TOKEN_BYTES, "arange"), tape.new(1, TOKEN_BYTES, "arange")
    queries, keys = counted(tape, length), counted(tape, length)
    if window is None:
        mask = tape.new(length**2, 1, "le")
    else:
        first = tape.new(length, TOKEN_BYTES, "sub")
        within = tape.new(length**2, 1, "gt")
        del first
        near = tape.new(length**2, 1, "bitwise_and")
        del within
        past = tape.new(length**2, 1, "le")
        mask = tape.new(length**2, 1, "bitwise_and")
        del near, past
    del batches, heads, queries, keys
    return mask


def additive_mask(tape: Tape, run: ForwardRun, window: int | None, width: int) -> Tensor:
    """`eager_mask`: what is added to the scores, [batch, 1, sequence, sequence], in a dtype of that width."""
    mask = boolean_mask(tape, run, window)
    added = tape.new(run.batch * mask.numel, width, "where")
    del mask
    return added


def counted(tape: Tape, length: int) -> Tensor:
    """A range of so many numbers, to which another is added."""
    numbers = tape.new(length, TOKEN_BYTES, "arange")
    counted = tape.new(length, TOKEN_BYTES, "add")
    del numbers
    return counted


def sdpa(tape: Tape, q: Tensor, k: Tensor, v: Tensor, heads: Heads, *, mask: Tensor | None = None) -> Tensor:
    """`sdpa_attention_forward`, of the shape of the query."""
    if heads.queries != heads.keys and (mask is not None or heads.width > LARGEST_GROUPED_HEAD):
        k, v = _repeat_kv(tape, k, q, heads), _repeat_kv(tape, v, q, heads)
        heads = heads.ungrouped
    return contiguous(tape, attention(tape, q, k, v, heads, mask=mask))


def eager(
    tape: Tape, q: Tensor, k: Tensor, v: Tensor, heads: Heads, *, mask: Tensor | None, caps: bool = False, softmax_width: int = FP32
) -> Attended:
    """`eager_attention_forward` with `repeat_kv`: the score matrices in full. It gives the weights back as well."""
    k, v = _repeat_kv(tape, k, q, heads, is_by_head=heads.is_by_head), _repeat_kv(tape, v, q, heads)
    rows = in_order(q) if heads.is_by_head else strided(q.view())
    weights = mul(tape, matrix_product(tape, rows, k, heads.rows * heads.sequence, heads.batch, inner=heads.width, transposed=True))
    if caps:
        weights = over_number(tape, weights)
        weights = tanh(tape, weights)
        weights = mul(tape, weights)
    if mask is not None:
        weights = add(tape, weights, mask)
    if softmax_width:
        weights = cast(tape, softmax(tape, weights, width=softmax_width), q.width)
    else:
        weights = softmax(tape, weights)
        weights = cast(tape, weights, q.width)
    weights = dropout(tape, weights, heads.dropout)
    out = by_position(tape, matrix_product(tape, weights, v, q.numel, heads.batch, inner=heads.sequence), heads.batch)
    return contiguous(tape, out), weights


def _repeat_kv(tape: Tape, x: Tensor, q: Tensor, heads: Heads, *, is_by_head: bool = False) -> Tensor:
    """`repeat_kv`: keys or values once for every head of the queries; one head is repeated by a view."""
    return expanded(tape, x, q.numel) if heads.keys == 1 < heads.queries else repeated(tape, x, q.numel, is_by_head=is_by_head)


def _gelu_new(tape: Tape, x: Tensor) -> Tensor:
    """`NewGELUActivation` (activations.py): operator by operator."""
    half = mul(tape, x)
    return mul(tape, half, plus_number(tape, tanh(tape, mul(tape, add(tape, x, mul(tape, power(tape, x)))))))


def _kernel(name: str) -> Callable[[Tape, Tensor], Tensor]:
    return lambda tape, x: activation(tape, name, x)


ACTIVATIONS: Mapping[str, Callable[[Tape, Tensor], Tensor]] = {
    "silu": _kernel("silu"),
    "swish": _kernel("silu"),
    "gelu": _kernel("gelu"),
    "gelu_pytorch_tanh": _kernel("gelu"),
    "gelu_new": _gelu_new,
    "relu": relu,
}
"""By the name that a configuration gives them."""


def act(tape: Tape, kind: object, name: str, x: Tensor) -> Tensor:
    """An activation function, a module of its own."""
    function = ACTIVATIONS.get(kind) if isinstance(kind, str) else None
    if function is None:
        raise NoTape(f"the activation function {shown(kind)} is not modelled")
    return tape.module(name, lambda x: function(tape, x), x)
