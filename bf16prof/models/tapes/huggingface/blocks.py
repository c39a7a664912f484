"""What the families have in common: norms, rotary positions, attention with grouped heads, masks, gated MLPs."""

from __future__ import annotations

from collections.abc import Callable

from bf16prof.models.autograd.attention import Heads, attention, repeated
from bf16prof.models.autograd.operators import FP32, TOKEN_BYTES, activation, add, cast, concatenate, contiguous, mul, negative
from bf16prof.models.autograd.pointwise import plus_number, power, reciprocal_root, row_mean, sliced
from bf16prof.models.autograd.tape import Tape, Tensor
from bf16prof.models.shapes.huggingface.config import Config, shown
from bf16prof.models.tapes import NoTape, Run

LAYER_TYPES = ("sliding_attention", "full_attention")
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


def rotary(tape: Tape, positions: Tensor, turned: int, width: int) -> Tables:
    """`LlamaRotaryEmbedding.forward`: tables [sequence, turned] in the dtype of the hidden states, computed in fp32."""
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
    cos, sin = tables
    q_embed = add(tape, mul(tape, q, cos), mul(tape, _half_turned(tape, q), sin))
    k_embed = add(tape, mul(tape, k, cos), mul(tape, _half_turned(tape, k), sin))
    return q_embed, k_embed


def _half_turned(tape: Tape, x: Tensor) -> Tensor:
    first, second = sliced(tape, x, x.numel // 2), sliced(tape, x, x.numel // 2)
    return concatenate(tape, negative(tape, second), first)


def windows_of(config: Config, window: int | None, slides: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer's attention, by `layer_types`; by number where the configuration has none."""
    types = config.items("layer_types") or [LAYER_TYPES[not slides(index)] for index in config.layers()]
    if len(types) < len(config.layers()) or not set(types) <= set(LAYER_TYPES):
        raise NoTape(f"model.hf_config.layer_types: {shown(types)} is not modelled")
    return [window if name == "sliding_attention" else None for name, _ in zip(types, config.layers(), strict=False)]


def needs_mask(run: Run, window: int | None) -> bool:
    """`_ignore_causal_mask_sdpa` (masking_utils.py): attention that is plainly causal needs none."""
    return window is not None and run.sequence >= window


def causal_mask(tape: Tape, run: Run, window: int | None) -> Tensor | None:
    """`sdpa_mask`: a boolean one [sequence, sequence] where it is needed."""
    length = run.sequence
    if not needs_mask(run, window):
        return None
    batches, heads = tape.new(run.batch, TOKEN_BYTES, "arange"), tape.new(1, TOKEN_BYTES, "arange")
    queries, keys = counted(tape, length), counted(tape, length)
    within = tape.new(length**2, 1, "gt")
    near = tape.new(length**2, 1, "bitwise_and")
    del within
    past = tape.new(length**2, 1, "le")
    mask = tape.new(length**2, 1, "bitwise_and")
    del batches, heads, queries, keys, near, past
    return mask


def counted(tape: Tape, length: int) -> Tensor:
    """A range of so many numbers, to which another is added."""
    numbers = tape.new(length, TOKEN_BYTES, "arange")
    counted = tape.new(length, TOKEN_BYTES, "add")
    del numbers
    return counted


def attend(tape: Tape, q: Tensor, k: Tensor, v: Tensor, heads: Heads, *, mask: Tensor | None = None) -> Tensor:
    """`sdpa_attention_forward`, of the shape of the query."""
    if heads.queries != heads.keys and (mask is not None or heads.width > LARGEST_GROUPED_HEAD):
        k, v = repeated(tape, k, q.numel), repeated(tape, v, q.numel)
        heads = heads.ungrouped
    return contiguous(tape, attention(tape, q, k, v, heads, mask=mask))


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu"}


def act(tape: Tape, kind: object, name: str, x: Tensor) -> Tensor:
    """The activation function of a configuration's `hidden_act`, a module of its own."""
    if kind not in ACTIVATIONS:
        raise NoTape(f"the activation function {kind!r:.40} is not modelled")
    return tape.module(name, lambda x: activation(tape, ACTIVATIONS[str(kind)], x), x)
