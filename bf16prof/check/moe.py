"""A mixture of experts as Liger-Kernel's `fused_moe` benchmark has it, in transformers' plain loop
over the experts that were hit.

How many tokens an expert gets decides which sizes are allocated. The benchmark seeds the generator,
so that the routing of its GPU can be computed (`philox`); the loop takes the numbers of tokens from
there, since fake tensors have no values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bf16prof.check.philox import Generator

SEED = 42
SCALE = 0.02


def tokens_of_experts(shape: Mapping[str, int], multiprocessors: int) -> list[int]:
    """How many tokens each expert gets on a GPU with so many multiprocessors (of 2,048 threads)."""
    import numpy as np

    tokens, experts, chosen = shape["T"], shape["E"], shape["K"]
    hidden, wide = shape["H"], shape["intermediate_dim"]
    random = Generator(SEED, multiprocessors)
    for elements in (tokens * hidden, experts * 2 * wide * hidden, experts * hidden * wide):
        random.skip(elements)
    scores = random.normal(tokens * experts).reshape(tokens, experts)
    best = np.argpartition(scores, -chosen, axis=1)[:, -chosen:] if chosen < experts else np.tile(np.arange(experts), (tokens, 1))
    return [int(each) for each in np.bincount(best.ravel(), minlength=experts)]


def mixture(shape: Mapping[str, Any], device: torch.device, dtype: torch.dtype, counts: Sequence[int]) -> Any:
    """The function that is measured: `forward` of the mixture for inputs that are kept."""
    tokens, experts, chosen = shape["T"], shape["E"], shape["K"]
    hidden, wide = shape["H"], shape["intermediate_dim"]
    like: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": True}
    x = torch.randn(tokens, hidden, **like)
    first = torch.randn(experts, 2 * wide, hidden, **like) * SCALE  # the leaf before the product stays alive in the graph
    second = torch.randn(experts, hidden, wide, **like) * SCALE
    scores = torch.randn(tokens, experts, device=device)
    index = torch.topk(scores, chosen, dim=-1).indices.to(torch.int32)
    weights = torch.softmax(torch.gather(scores, 1, index.long()), dim=-1).to(dtype).requires_grad_()
    del scores

    def forward() -> Tensor:
        final = torch.zeros_like(x)
        with torch.no_grad():
            mask = functional.one_hot(index.long(), num_classes=experts).permute(2, 1, 0)
            hit = _hit(torch.greater(mask.sum(dim=(-1, -2)), 0), counts)
        for expert, count in enumerate(counts):
            if not count:
                continue
            place, token = _where(mask[expert], count)
            part = x[token]
            gate, up = functional.linear(part, first[expert]).chunk(2, dim=-1)
            part = functional.silu(gate) * up
            part = functional.linear(part, second[expert])
            part = part * weights[token, place, None]
            final.index_add_(0, token, part.to(final.dtype))
        assert hit is not None
        return final

    return forward


def _hit(flags: Tensor, counts: Sequence[int]) -> Tensor:
    """`nonzero` of so many."""
    return torch.empty(sum(count > 0 for count in counts), 1, dtype=torch.int64, device=flags.device)


def _where(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.where` of a mask with so many entries: two columns of one tensor."""
    found = torch.zeros(count, 2, dtype=torch.int64, device=mask.device)
    place, token = found.unbind(1)
    return place, token
