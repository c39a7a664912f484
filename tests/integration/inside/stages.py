"""Models for DeepSpeed's PipelineModule, of sizes that do not divide evenly."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Twice(nn.Module):
    """Hands on two tensors, one of which has no gradient."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, given: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The first of them goes on through the layer."""
        x, count = given if isinstance(given, tuple) else (given, torch.ones(3, dtype=torch.int64, device=given.device))
        return functional.gelu(self.linear(x)), count


class Last(nn.Module):
    """Logits of the first tensor."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, vocabulary)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, sequence, vocabulary]."""
        logits: Tensor = self.linear(given[0])
        return logits


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Next tokens."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def layers() -> tuple[list[Any], Any]:
    """A list of layers, and a loss."""
    from deepspeed.pipe import LayerSpec

    return [LayerSpec(nn.Embedding, 256, 33), *[LayerSpec(Twice, 33)] * 5, LayerSpec(Last, 33, 256)], loss


def module() -> nn.Module:
    """A PipelineModule of two stages, cut by the number of layers."""
    from deepspeed.pipe import PipelineModule

    found = layers()
    made: nn.Module = PipelineModule(layers=found[0], num_stages=2, loss_fn=found[1], partition_method="uniform")
    return made


def odd() -> list[int]:
    """Nothing that a pipeline could be made of."""
    return [1, 2, 3]
