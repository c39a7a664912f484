"""A model with DeepSpeed's MoE layers, of sizes that do not divide evenly."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class Mixture(nn.Module):
    """Token ids and labels to a loss, through two layers of four experts each, which lie on so many
    ranks."""

    def __init__(self, ranks: int, k: int, **gate: Any) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.tokens = nn.Embedding(256, 30)
        expert = nn.Sequential(nn.Linear(30, 61), nn.GELU(), nn.Linear(61, 30))
        self.layers = nn.ModuleList(MoE(30, expert, num_experts=4, ep_size=ranks, k=k, capacity_factor=1.5, **gate) for _ in range(2))
        self.head = nn.Linear(30, 256)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy, and what balances the experts."""
        x, extra = self.tokens(input_ids), 0.0
        for layer in self.layers:
            mixed, auxiliary, _ = layer(x)
            x, extra = x + mixed, extra + auxiliary
        loss: Tensor = functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten()) + 0.01 * extra
        return loss


def over_two() -> nn.Module:
    """The experts of a layer on two ranks, one for each token."""
    return Mixture(2, 1)


def two_of_two() -> nn.Module:
    """The same, two for each token."""
    return Mixture(2, 2)


def dropless() -> nn.Module:
    """Experts that take whatever comes."""
    return Mixture(2, 1, drop_tokens=False)
