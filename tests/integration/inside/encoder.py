"""A model that copies its layers and uses parameters of modules that it does not call
(`nn.MultiheadAttention`'s `out_proj`)."""

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Token ids to logits through `nn.TransformerEncoder`, whose layers are deep copies of one."""

    def __init__(self, vocabulary: int, hidden: int, wide: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(hidden, 3, wide, batch_first=True), 2)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary]."""
        logits: torch.Tensor = self.head(self.layers(self.tokens(input_ids)))
        return logits


def make() -> nn.Module:
    """The model, of sizes that do not divide evenly among three ranks."""
    return Encoder(101, 60, 130)
