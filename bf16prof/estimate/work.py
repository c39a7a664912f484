"""Floating-point operations of one rank and one optimizer step, from the parameter inventory and the order of calls.

A multiplication and an addition count as two. Only matrix products count (norms, activations, softmax and the optimizer do not), as in
PaLM's appendix B (Chowdhery et al. 2022, arXiv 2204.02311) and in `torch.utils.flop_counter`:

* a weight matrix of n elements: 2 n per token in forward, 4 n in backward (gradients of the input and of the weight);
* attention: 4 s h per token and layer in forward (scores and weighted values; s = sequence, h = heads x head width), twice that in
  backward. A causal mask is not taken off: all s x s scores count, as in both sources. Grouped keys and values change the projections only.
  What a fused attention kernel computes again in backward is not counted.

Over all weight matrices this is PaLM's 6 N + 12 L H Q T per token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bf16prof.models.execution import Call, execution, is_matrix
from bf16prof.models.shapes import ParameterSpec, inventory
from bf16prof.profiles.models import ModelSettings


@dataclass(frozen=True)
class Flops:
    """Operations of one micro-step. `recomputed` is the part of the forward pass that activation checkpointing runs again in backward."""

    forward: int
    backward: int
    recomputed: int


@functools.cache
def micro_step_flops(model: ModelSettings, micro_batch: int, sequence: int, checkpointing: bool, stops_early: bool) -> Flops:
    """The operations of one forward and backward pass over [micro_batch, sequence] tokens.

    `stops_early`: non-reentrant checkpointing recomputes until the last tensor that backward needs is there
    (`torch.utils.checkpoint.set_checkpoint_early_stop`), which leaves out a matrix product at the end of a block. PyTorch's own Linear has
    told what it needs before it runs; ZeRO-3's `memory_efficient_linear` tells it afterwards (`zero/linear.py`).
    """
    specs, order = inventory(model), execution(model)
    tokens = micro_batch * sequence
    attention = 4 * tokens * sequence * model.hidden_size
    blocks = sum(_matrices(block, specs, tokens) + attention for block in order.blocks)
    outside = 2 * tokens * specs[order.head.parameters[0]].numel
    left_out = (
        sum(_matrices(list(block.leaves)[-1], specs, tokens) for block in order.blocks) if order.ends_in_matrix and stops_early else 0
    )
    forward = blocks + outside
    return Flops(forward, 2 * forward, blocks - left_out if checkpointing else 0)


def _matrices(call: Call, specs: list[ParameterSpec], tokens: int) -> int:
    """Forward operations of the weight matrices of a call."""
    return sum(2 * tokens * specs[index].numel for leaf in call.leaves for index in leaf.parameters if is_matrix(specs[index]))
