"""Layers with their parameters, as several families use them: `nn.LayerNorm` and `nn.Linear`."""

from __future__ import annotations

from bf16prof.models.autograd.operators import layer_norm, linear
from bf16prof.models.autograd.tape import Tape, Tensor


def norm_layer(tape: Tape, name: str, x: Tensor, hidden: int) -> Tensor:
    """`nn.LayerNorm` over the last dimension of x, `hidden` wide."""
    weight, bias = (tape.parameter(f"{name}.{part}", hidden) for part in ("weight", "bias"))
    return tape.module(name, lambda x: layer_norm(tape, x, hidden, weight, bias), x)


def linear_layer(tape: Tape, name: str, x: Tensor, inputs: int, outputs: int, *, bias: bool = True) -> Tensor:
    """`nn.Linear` of x [..., inputs] to [..., outputs]."""
    weight = tape.parameter(f"{name}.weight", inputs * outputs)
    added = tape.parameter(f"{name}.bias", outputs) if bias else None
    return tape.module(name, lambda x: linear(tape, x, weight, added, inputs), x)
