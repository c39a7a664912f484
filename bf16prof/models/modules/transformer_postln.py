"""The model of the published example (see `shapes/transformer_postln.py`): no causal mask, no
dropout, as published."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bf16prof.models.modules import run_layers
from bf16prof.models.modules.ends import Positions
from bf16prof.profiles.models import ModelSettings


class PostLnBlock(nn.Module):
    """Self-attention and MLP, each followed by a residual sum and a layer norm. x: [batch,
    sequence, hidden]."""

    def __init__(self, hidden: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.ff = nn.Sequential(nn.Linear(hidden, intermediate), nn.GELU(), nn.Linear(intermediate, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of the shape of its input."""
        attended, _ = self.attention(x, x, x)
        x = self.norm1(x + attended)
        mixed = self.ff(x)
        x = self.norm2(x + mixed)
        return x  # noqa: RET504 - the published block holds these names to its end, and with them the tensors


def build(model: ModelSettings, *, activation_checkpointing: bool) -> nn.Module:
    """The model of these sizes."""
    return PostLnTransformer(model, activation_checkpointing)


class PostLnTransformer(nn.Module):
    """Token ids [batch, sequence] to logits [batch, sequence, vocabulary]."""

    def __init__(self, model: ModelSettings, activation_checkpointing: bool) -> None:
        super().__init__()
        hidden = model.hidden_size
        self.checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(model.vocab_size, hidden)
        self.pos_embedding = nn.Embedding(model.max_sequence_length, hidden)
        intermediate = model.intermediate_size or 4 * hidden
        self.layers = nn.ModuleList(PostLnBlock(hidden, model.num_heads, intermediate) for _ in range(model.num_layers))
        self.output_proj = nn.Linear(hidden, model.vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every position."""
        batch, sequence = input_ids.shape
        positions = torch.arange(sequence, device=input_ids.device).unsqueeze(0).expand(batch, -1)
        x = self.embedding(input_ids) + self.pos_embedding(positions)
        logits: Tensor = self.output_proj(run_layers(self.layers, x, checkpointing=self.checkpointing))
        return logits


def pipeline_layers(model: ModelSettings) -> list[Any]:
    """The model as DeepSpeed's PipelineModule takes it."""
    from deepspeed.runtime.pipe.module import LayerSpec

    hidden = model.hidden_size
    return [
        LayerSpec(nn.Embedding, model.vocab_size, hidden),
        LayerSpec(Positions, model.max_sequence_length, hidden),
        *[LayerSpec(PostLnBlock, hidden, model.num_heads, model.intermediate_size or 4 * hidden)] * model.num_layers,
        LayerSpec(nn.Linear, hidden, model.vocab_size),
    ]
