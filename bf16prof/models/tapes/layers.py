"""Layers with their parameters, as several families use them: `nn.LayerNorm` and `nn.Linear`."""

from __future__ import annotations

from bf16prof.models.autograd.operators import layer_norm, linear
from bf16prof.models.autograd.pointwise import dropout
from bf16prof.models.autograd.tape import Tape, Tensor


def norm_layer(tape: Tape, name: str, x: Tensor, hidden: int, *, affine: bool = True) -> Tensor:
    """`nn.LayerNorm` over the last dimension of x, `hidden` wide."""
    weight, bias = (tape.parameter(f"{name}.{part}", hidden) if affine else None for part in ("weight", "bias"))
    return tape.module(name, lambda x: layer_norm(tape, x, hidden, weight, bias), x)


def linear_layer(tape: Tape, name: str, x: Tensor, inputs: int, outputs: int, *, bias: bool = True, is_matrix: bool = False) -> Tensor:
    """`nn.Linear` of x [..., inputs] to [..., outputs]."""
    weight = tape.parameter(f"{name}.weight", inputs * outputs)
    added = tape.parameter(f"{name}.bias", outputs) if bias else None
    return tape.module(name, lambda x: linear(tape, x, weight, added, inputs, is_matrix=is_matrix), x)


def dropout_layer(tape: Tape, name: str, x: Tensor, share: float) -> Tensor:
    """`nn.Dropout`."""
    return tape.module(name, lambda x: dropout(tape, x, share), x)
