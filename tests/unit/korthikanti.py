"""Korthikanti et al. 2022 (arXiv 2205.05198): what a transformer's activations, parameters,
gradients and optimizer take."""

from __future__ import annotations

from typing import Literal

ADAM_BYTES = 18
"""Bytes per parameter of Megatron's mixed precision: 2 + 4 of its gradients, 12 of the
optimizer."""


def layer_bytes(
    sequence: int,
    batch: int,
    hidden: int,
    heads: int,
    *,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> float:
    """Activations that a transformer layer keeps for backward, table 2, in bytes.

    16-bit, with dropout, an MLP of 4 x hidden, and attention that keeps its score matrix unless
    `recompute` is selective (it is computed again) or full (only the layer's input is kept).
    """
    tokens = sequence * batch * hidden
    if recompute == "full":
        return 2 * tokens
    whole, cut = (0, 34) if sequence_parallel else (10, 24)
    scores = 5 * heads * sequence / hidden if recompute == "none" else 0
    return tokens * (whole + (cut + scores) / tensor_parallel)


def figure_bytes(layers: int, layer_bytes: float, *, pipeline_parallel: int = 1, interleave: int = 1) -> float:
    """Activations of the first pipeline stage, which keeps those of all layers (figure 1):
    interleaving adds (p - 1) / (p m) of them."""
    return layers * layer_bytes * (1 + (pipeline_parallel - 1) / (pipeline_parallel * interleave))


def states_bytes(layers: int, hidden: int, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> float:
    """Parameters, gradients and optimizer state of the layers (figure 1): 12 hidden^2 parameters a
    layer, `ADAM_BYTES` each."""
    return 12 * layers * hidden**2 * ADAM_BYTES / (tensor_parallel * pipeline_parallel)
