"""What the scripts of this folder train: a language model of two layers."""

import torch
from torch import nn

VOCABULARY = 101
SEQUENCE = 16


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class TinyModel(nn.Module):
    def __init__(self, hidden=32, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList([Block(hidden) for _ in range(layers)])
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def config(stage, accumulation=1, **more):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000},
        **more,
    }


class Tokens(torch.utils.data.Dataset):
    """Token ids and labels of fixed length."""

    def __init__(self, count=64):
        self.rows = torch.randint(0, VOCABULARY, (count, SEQUENCE), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index].clone(), "labels": self.rows[index].clone()}
