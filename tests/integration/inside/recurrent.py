"""A model whose layers keep for backward what only their kernels know: recurrent layers and cells,
and every kind of norm."""

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """Token ids to logits through an LSTM, a cell step by step, and norms of rows and of groups."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.layers, self.gru = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True), nn.GRU(hidden, hidden, batch_first=True)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.rows, self.squares, self.groups = nn.LayerNorm(hidden), nn.RMSNorm(hidden), nn.GroupNorm(6, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary]."""
        x = self.rows(self.layers(self.tokens(input_ids))[0])
        x = self.squares(self.gru(x)[0])
        state = x.new_zeros(2, len(x), x.shape[2])
        steps = []
        for step in x.unbind(1):
            state = torch.stack(self.cell(step, (state[0], state[1])))
            steps.append(state[0])
        x = self.groups(torch.stack(steps, dim=2)).transpose(1, 2)
        logits: Tensor = self.head(x)
        return logits


def make() -> nn.Module:
    """The model, of sizes that do not divide evenly."""
    return Recurrent(101, 42)
