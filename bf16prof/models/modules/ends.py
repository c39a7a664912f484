"""Both ends of a model as layers of a pipeline: learned positions, and a head that is the
embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Positions(nn.Module):
    """Adds to x [batch, sequence, hidden] the vectors of its positions."""

    def __init__(self, longest: int, hidden: int) -> None:
        super().__init__()
        self.table = nn.Embedding(longest, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of the input."""
        out: Tensor = x + self.table(torch.arange(x.shape[1], device=x.device))
        return out


def as_head(embedding: nn.Embedding, x: Tensor) -> Tensor:
    """Logits by the table of an embedding."""
    return functional.linear(x, embedding.weight)
